"""Addresses of object stores, and which of them hold credentials, that no file, log or message may get to see."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"://[^/:\[]*:(?![0-9]*(/|$))[^@]*@")
"""`user:password@`, the password with any sign in it; not the port of a host."""
_NAME = re.compile(r"https?://[^/@]*@")
"""Where a name alone may be a token."""
_QUERY = re.compile(r"://.*\?.*=")
"""`?token=…` and its like, by whatever name."""


def holds_credentials(text: str) -> bool:
    """Whether an address, or addresses that are chained, have a password or a query in them."""
    return any(pattern.search(text) for pattern in (_PASSWORD, _NAME, _QUERY))


def where_credentials_belong(name: str) -> str:
    """The error for such an address, which it does not show. name: of what held it."""
    return (
        f"{name}: expected an address without credentials, got one with a password or a query (not shown): give them "
        "in the environment or in the files of fsspec's driver (docs/data.md), and change them if others could read it"
    )
