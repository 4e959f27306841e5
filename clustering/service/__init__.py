"""The cluster service of a training: bank, refresh, publication."""
