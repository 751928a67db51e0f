"""What ``gcfast build --embeddings`` takes instead of running every picture."""
