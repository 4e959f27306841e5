"""Clusters beside the training: bank, k-means, hard level, margins, alignment and contrastive losses, one service."""
