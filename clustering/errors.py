"""Errors of the cluster service."""

from __future__ import annotations


class ClusterStateError(RuntimeError):
    """Saved clusters do not fit this run, or ranks hold different versions of them."""
