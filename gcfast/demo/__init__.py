"""The embedded demonstration: drawn birds, a small network trained on half of their species."""
