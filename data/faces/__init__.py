"""Synthetic faces, part by part: `data.synthetic` is what uses them."""
