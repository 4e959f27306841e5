"""Does cluster guidance help? Cells, arms, paired seeds and two kinds of data, decided before the runs."""
