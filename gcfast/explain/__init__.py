"""From images to maps."""
