"""Image files to batches, and maps to pages."""
