"""The error of everything that can be wrong with a user's data."""

from __future__ import annotations


def said(error: BaseException) -> str:
    """What an error says, in a line; its kind, where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class DataError(ValueError):
    """Data on disk are missing or not as expected; one line: which file, what was expected, found, and what to do."""

    def __str__(self) -> str:
        """Names of files and archive members come from strangers: what would end the line or steer a terminal is
        written as its escape.
        """
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
