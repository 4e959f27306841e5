"""What the capacity planner is held against."""
