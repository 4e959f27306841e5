"""The error of everything that can be wrong with a user's data."""

from __future__ import annotations


class DataError(ValueError):
    """Data on disk are missing or not as expected; one line: which file, what was expected, found, and what to do."""
