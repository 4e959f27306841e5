"""What a place that a run reports to must be able to do, and what such places have in common."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from configs.extras import installing
from configs.schema import ConfigError, RunConfig
from data.contact_sheet import Pixels
from data.errors import DataError
from data.errors import said as in_a_line
from data.files import appearing

_LONGEST = 200
"""Signs of a name; MLflow takes 250."""
_LONGEST_ERROR = 300
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


class Sink(Protocol):
    """A place that rank 0 reports to. Each method may raise whatever its library raises, and may wait for a network:
    whoever calls it sees to that (`Sinks`, `Queued`).
    """

    name: str
    """In messages: which place."""

    def start(self, config: RunConfig, output: Path, *, resumed: bool) -> str:
        """Begin, or, when the run is resumed, go on with what a former process of this output folder began: where the
        run is to be seen. May be called again after it failed.
        """

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        """Values by their TensorBoard tags, after `step` optimizer steps, at `when` in seconds since 1970."""

    def picture(self, step: int, tag: str, picture: Pixels) -> None:
        """picture: uint8 (H, W, 3), RGB."""

    def close(self, *, failed: bool) -> None:
        """End. failed: the training ended by an error."""


class Names:
    """Tags as a place takes them, no two of them alike."""

    def __init__(self, spelled: Callable[[str], str], *, taken: Iterable[str] = ()) -> None:
        """spelled: a tag by signs that the place takes. taken: names that no tag gets."""
        self._spelled, self._names, self._taken = spelled, dict[str, str](), set(taken)

    def __call__(self, tag: str) -> str:
        if tag not in self._names:
            name = self._spelled(tag)[:_LONGEST]
            if name in self._taken:
                name = f"{name}_{zlib.crc32(tag.encode('utf-8', 'surrogatepass')):08x}"
            self._taken.add(name)
            self._names[tag] = name
        return self._names[tag]


def plain(tag: str) -> str:
    """A tag of letters, digits, _, - and single /, as in tar_far_1e-3 for tar@far=1e-3."""
    return "/".join(re.sub("[^A-Za-z0-9_-]", "_", part) for part in tag.split("/") if part) or "_"


def library(module: str, extra: str, setting: str) -> Any:
    """Import what a setting asks for. Raises ConfigError when it is not there or does not load."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that does not suit the others raises anything
        raise ConfigError(
            f"{setting}: {module} does not load ({said(error)}): leave it empty, or, {installing(extra)}"
        ) from None


def said(error: BaseException) -> str:
    """An error in a line, without the keys of the environment."""
    text = in_a_line(error)
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "…")
    text = text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}…"
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def run_name(output: Path) -> str:
    """Of a run, for people: its folder's, in UTF-8."""
    name = output.absolute().name or "clusterface"
    return name.encode("utf-8", "replace").decode()[:_LONGEST]


def kept_id(path: Path) -> str:
    """The identity that a former process kept there; empty when there is none that can be one."""
    try:
        with path.open("rb") as file:
            text = file.read(100).decode("ascii", "replace").strip()
    except OSError:
        return ""
    return text if _ID.fullmatch(text) else ""


def keep_id(path: Path, identity: str) -> None:
    """Keep it for the process that resumes. Where that cannot be, the resumed run is another one there, no more."""
    with contextlib.suppress(DataError), appearing([path]) as (partial,):
        partial.write_text(identity + "\n", encoding="ascii")
