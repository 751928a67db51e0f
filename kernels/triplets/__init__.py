"""What drawing triplets and averaging over all of them share: tries, and scans of the table."""
