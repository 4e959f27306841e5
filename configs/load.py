"""YAML files and `--set section.field=value` become a checked `RunConfig`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import reprlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from configs.addresses import holds_credentials, where_credentials_belong
from configs.schema import ConfigError, RunConfig

_PATHS = ("data.path", "train.output", "train.checkpoints", "eval.sets", "clustering.start")
"""Settings in which a leading ~ is the home folder."""
_MOST_BYTES = 1 << 16
"""Of a recipe: ours have two thousand, and YAML can take quadratic time."""
_MOST_BITS = 64
"""Of a whole number; the schema's checks say what fits each setting."""
_NAME = 80
"""Characters of a key that is shown as it stands."""
_MOST_SHOWN = 1 << 13
"""Bits of a number whose digits Python agrees to write."""
Section = TypeVar("Section")


class _Short(reprlib.Repr):
    """Of values in messages: aliases of aliases stand for more than any memory holds, and texts may be secrets."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 200, 200

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() <= _MOST_SHOWN else "a huge number"

    def repr_str(self, x: str, level: int) -> str:
        return "an address with credentials, not shown" if holds_credentials(x) else super().repr_str(x, level)


_shown = _Short().repr


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides on top of it; later overrides win.

    path: a YAML file of sections, or None for the defaults. overrides: "section.field=value", value in YAML,
    for a text setting whatever stands there (a date, a number). A ~ that begins a path becomes the home folder.
    Raises ConfigError, one line, when the file is missing or not YAML in UTF-8, a key is unknown (the nearest known one
    is named), a value has the wrong type or range, or an address has credentials in it.
    """
    sections = {f.name: typing.cast(type, f.default_factory) for f in dataclasses.fields(RunConfig)}
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = read_yaml(path, "--config ")
        except OSError as error:
            raise ConfigError(f"--config {path}: cannot read it ({error.strerror})") from None
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"--set {_shown(override)}: expected section.field=value, for example train.epochs=5")
        values = tree.get(section) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{section}: expected a section with fields, got {_shown(values)}")
        is_text = section in sections and typing.get_type_hints(sections[section]).get(key) is str
        value = _override(override, text.strip(), is_text=is_text)
        tree[section] = {**values, key: value}
    _refuse_unknown(tree, sections, "")
    config = RunConfig(**{name: read_section(sections[name], name, values) for name, values in tree.items()})
    _refuse_credentials(config)
    return config


def read_yaml(path: Path, prefix: str = "") -> dict[str, Any]:
    """Sections of a YAML file, which may be a stranger's: no tags that make objects, and bounded time and memory.

    prefix: of messages, before the path. Raises ConfigError, and OSError where it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{prefix}{path}: expected settings in at most {_MOST_BYTES} bytes, got more")
    try:
        loaded = yaml.safe_load(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{prefix}{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that no calendar has
        raise ConfigError(f"{prefix}{path}: not valid YAML: {' '.join(str(error).split()):.400}") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{prefix}{path}: expected sections such as `train:`, got {type(loaded).__name__}")
    return dict(loaded or {})


def _refuse_credentials(config: RunConfig) -> None:
    """Before anything is written: the configuration goes to a file, to TensorBoard and into checkpoints."""
    path = config.data.path
    if holds_credentials(path):
        raise ConfigError(where_credentials_belong("data.path"))
    if holds_credentials(config.train.checkpoints):
        raise ConfigError(where_credentials_belong("train.checkpoints"))
    if any(holds_credentials(name if "://" in name else f"{path}/{name}") for name in config.eval.sets):
        raise ConfigError(where_credentials_belong("eval.sets"))


def _override(override: str, text: str, *, is_text: bool) -> Any:
    """What stands behind the sign of equality: YAML; for a text setting as it stands, unless quoted or null."""
    if is_text and text[:1] not in ("'", '"') and text not in ("", "~", "null"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {_shown(override)}: the value is not valid YAML") from None
    except RecursionError:
        raise ConfigError(f"--set {_shown(override)}: the value is nested too deeply") from None
    except ValueError:  # a date that no calendar has: what it is here, the setting's own check says
        return text


def _refuse_unknown(found: Iterable[Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in found:
        if key not in known:
            name = key if isinstance(key, str) and key.isprintable() and len(key) <= _NAME else _shown(key)
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}{name}: unknown setting; {hint}")


def read_section(kind: type[Section], name: str, values: Any) -> Section:
    """A section of the schema from what YAML gave for it. Raises ConfigError."""
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: expected a section with fields, got {_shown(values)}")
    hints = typing.get_type_hints(kind)
    _refuse_unknown(values, hints, f"{name}.")
    return kind(**{key: _value(hints[key], f"{name}.{key}", value) for key, value in values.items()})


def _value(hint: Any, name: str, value: Any) -> Any:
    """Value of the type the schema asks for; the schema's own checks see to ranges and choices."""
    huge = isinstance(value, int) and value.bit_length() > _MOST_BITS
    if typing.get_origin(hint) is typing.Literal:
        if huge or not isinstance(value, (str, int, float, type(None))):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise ConfigError(f"{name}: expected one of {choices}, got {_shown(value)}")
        return value
    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name}: expected a list of names, got {_shown(value)}")
        return tuple(_path(name, item) for item in items)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 takes 1e-3 for a string
    if type(value) is not hint or (hint is float and not math.isfinite(value)) or (hint is int and huge):
        text = "text, in quotes where YAML takes it for something else"
        expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: text}[hint]
        raise ConfigError(f"{name}: expected {expected}, got {_shown(value)}")
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
