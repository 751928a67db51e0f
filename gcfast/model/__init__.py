"""The user's network: hooked, and left as it was."""
