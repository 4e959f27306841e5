"""Embeddings of pairs and of whole sets: where they come from and go to."""
