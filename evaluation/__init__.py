"""Evaluation: embeddings of image pairs, ten-fold accuracy, exact ROC with TAR@FAR, and their plots."""
