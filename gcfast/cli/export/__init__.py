"""The command ``gcfast export``."""
