"""Batches for training: decoding, augmentation, the CPU loader and DALI."""
