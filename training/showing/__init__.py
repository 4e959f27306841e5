"""What a run shows of itself: scalars, times, pictures, traces."""
