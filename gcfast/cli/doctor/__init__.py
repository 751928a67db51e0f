"""The command ``gcfast doctor``."""
