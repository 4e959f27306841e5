"""Record files: from the bytes of a `.rec` to the samples of a set."""
