"""The command ``gcfast serve``."""
