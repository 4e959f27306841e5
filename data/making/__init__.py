"""New sets: packed from images, tables and archives, or rewritten from other sets."""
