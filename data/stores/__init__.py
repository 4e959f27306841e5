"""Sets in object stores, and the blocks of them that are kept on a local disk."""
