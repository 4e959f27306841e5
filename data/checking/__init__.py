"""Is a set sound, and is a copy the same."""
