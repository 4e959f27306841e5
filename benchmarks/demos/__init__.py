"""Trainings on the demo's faces that differ in a few settings."""
