"""Tables and figures over labelled data."""
