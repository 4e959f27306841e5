"""IJB-B and IJB-C: their files, templates, scores of pairs."""
