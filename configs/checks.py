"""How a setting is checked, and the error that says it is wrong."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is missing, unknown or out of range; the message says which, what was got, and what is expected."""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")
