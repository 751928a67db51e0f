"""Image files to batches, and maps to pages."""

from gcfast.images.overlay import colorize, overlay
from gcfast.images.placed import overlay_whole

__all__ = ["colorize", "overlay", "overlay_whole"]
