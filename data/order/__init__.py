"""Which sample comes when: pure functions of seed, epoch and place."""
