"""How the packages of an extra come into the environment, for errors that name one."""

from __future__ import annotations


def installing(extra: str) -> str:
    """A command for the checkout that the project is used from. extra: a name of setup.py's `extras_require`."""
    return f"in the checkout: pip install -c constraints.txt -e '.[{extra}]'"


def driver_for(address: str) -> str:
    """What to install for an object store's address, such as s3://bucket/folder."""
    return installing("s3") if address.startswith("s3") else "install the one for fsspec"
