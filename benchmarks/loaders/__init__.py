"""Ways to read the same records, and the records."""
