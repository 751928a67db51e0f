"""Build a database from embeddings that exist already, without their images."""
