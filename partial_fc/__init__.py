"""Margin softmax over class centres sharded across ranks (Partial FC)."""
