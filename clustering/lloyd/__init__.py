"""Stand-alone k-means: iterations, seeding, repair."""
