"""YAML files and `--set section.field=value` become a checked `RunConfig`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.schema import ConfigError, RunConfig

_PATHS = ("data.path", "train.output", "eval.sets", "clustering.start")
"""Settings in which a leading ~ is the home folder."""


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides on top of it; later overrides win.

    path: a YAML file of sections, or None for the defaults. overrides: "section.field=value", value in YAML,
    for a text setting whatever stands there (a date, a number). A ~ that begins a path becomes the home folder.
    Raises ConfigError, one line, when the file is missing or not YAML in UTF-8, a key is unknown (the nearest known one
    is named), or a value has the wrong type or range.
    """
    sections = {f.name: typing.cast(type, f.default_factory) for f in dataclasses.fields(RunConfig)}
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config {path}: cannot read it ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"--config {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
            raise ConfigError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"--config {path}: expected sections such as `train:`, got {type(loaded).__name__}")
        tree = dict(loaded or {})
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"--set {override!r}: expected section.field=value, for example train.epochs=5")
        values = tree.get(section) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{section}: expected a section with fields, got {values!r}")
        is_text = section in sections and typing.get_type_hints(sections[section]).get(key) is str
        value = _override(override, text.strip(), is_text=is_text)
        tree[section] = {**values, key: value}
    _refuse_unknown(tree, sections, "")
    return RunConfig(**{name: _section(sections[name], name, values) for name, values in tree.items()})


def _override(override: str, text: str, *, is_text: bool) -> Any:
    """What stands behind the sign of equality: YAML; for a text setting as it stands, unless quoted or null."""
    if is_text and text[:1] not in ("'", '"') and text not in ("", "~", "null"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML") from None
    except ValueError:  # a date that no calendar has: what it is here, the setting's own check says
        return text


def _refuse_unknown(found: Iterable[Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}{key}: unknown setting; {hint}")


def _section(kind: type, name: str, values: Any) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: expected a section with fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    _refuse_unknown(values, hints, f"{name}.")
    return kind(**{key: _value(hints[key], f"{name}.{key}", value) for key, value in values.items()})


def _value(hint: Any, name: str, value: Any) -> Any:
    """Value of the type the schema asks for; the schema's own checks see to ranges and choices."""
    if typing.get_origin(hint) is typing.Literal:
        return value
    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name}: expected a list of names, got {value!r}")
        return tuple(_path(name, item) for item in items)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 takes 1e-3 for a string
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        text = "text, in quotes where YAML takes it for something else"
        expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: text}[hint]
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")
    return _path(name, value) if hint is str else value


def _path(name: str, text: str) -> str:
    return os.path.expanduser(text) if name in _PATHS else text


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Plain dictionaries, lists, numbers and text: what YAML and checkpoints hold."""
    tree: dict[str, dict[str, Any]] = {}
    for name, section in dataclasses.asdict(config).items():
        tree[name] = {key: list(v) if isinstance(v, tuple) else v for key, v in section.items()}
    return tree


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as a recipe that `load_config` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
