"""Faults, and trainings that live through them."""
