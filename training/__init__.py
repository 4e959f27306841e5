"""The training loop and what it stands on: process group, optimizers, step, checkpoints, metrics."""
