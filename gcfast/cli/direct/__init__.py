"""Commands that explain pairs of pictures, and pictures towards texts."""
