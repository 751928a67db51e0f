"""Find the nearest rows of a database, and gather what they lend."""
