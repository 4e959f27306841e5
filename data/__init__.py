"""Training data: record files as the field packs them, decoding, sampling, loading and synthetic faces."""
