"""Wrong labels, duplicates, splits and copies, and the corrected set."""
