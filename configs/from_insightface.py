"""Recipes out of arcface_torch's configuration files.

Keys, their defaults and their meaning: arcface_torch's configs/base.py, and the published files beside it; names of
networks: its backbones/__init__.py; what `dali_aug` does: its dataset.py. As there, a key that a file does not set has
the value of base.py.
"""

from __future__ import annotations

import difflib
import os
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NoReturn

import yaml

from configs.literals import Setting, Value, read_settings
from configs.load import load_config
from configs.schema import ConfigError

_BASE: dict[str, Value] = {
    "margin_list": (1.0, 0.5, 0.0), "network": "r50", "output": None, "embedding_size": 512, "sample_rate": 1.0,
    "interclass_filtering_threshold": 0, "fp16": False, "batch_size": 128, "optimizer": "sgd", "lr": 0.1,
    "momentum": 0.9, "weight_decay": 5e-4, "frequent": 10, "dali": False, "dali_aug": False, "gradient_acc": 1,
    "seed": 2048, "num_workers": 2,
}  # fmt: skip
_NOT_IN_BASE = ("rec", "num_epoch", "warmup_epoch", "val_targets", "verbose", "num_image")
_NETWORKS = {
    **{f"r{depth}": f"iresnet{depth}" for depth in (18, 34, 50, 100, 200)},
    "mbf": "mobilefacenet",
    **{name: name for name in (
        "vit_t", "vit_t_dp005_mask0", "vit_s", "vit_s_dp005_mask_0", "vit_b", "vit_b_dp005_mask_005",
        "vit_l_dp005_mask_005", "vit_h",
    )},
}  # fmt: skip
_AUGMENT = {
    "colour": 0.2, "colour_range": 0.2, "grey": 0.1, "low_resolution": 0.1, "low_resolution_side": 0.5,
    "blur": 0.2, "blur_sigma": 1.1,
}  # fmt: skip
_LOGS = "logs for TensorBoard are in train.output"
NO_COUNTERPART = {
    "num_classes": "read from the records",
    "num_image": "read from the records",
    "resume": "a run goes on by itself from its newest checkpoint; train.resume=false starts over",
    "save_all_states": "checkpoints always hold everything",
    "verbose": "verification comes by epochs, eval.every_epochs",
    "using_wandb": _LOGS,
    "wandb_key": "a secret, not copied; " + _LOGS,
    "wandb_entity": _LOGS,
    "wandb_project": _LOGS,
    "wandb_log_all": _LOGS,
    "wandb_resume": _LOGS,
    "suffix_run_name": _LOGS,
    "save_artifacts": _LOGS,
    "notes": _LOGS,
}
"""Keys of theirs that no setting of ours stands for, and why."""


def translated(path: Path) -> str:
    """A recipe, YAML that `load_config` takes, for one of arcface_torch's files, with comments on what differs.

    Raises ConfigError, one line, for a file that is not plain settings (`configs.literals`), a key that is unknown, a
    network that we do not have, and values that the schema refuses.
    """
    recipe = _Recipe(path, read_settings(path))
    text = recipe.text()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "recipe.yaml"
        written.write_text(text, encoding="utf-8")
        try:
            load_config(written)
        except ConfigError as error:
            raise ConfigError(f"{path}: {str(error).removeprefix(f'--config {written}: ')}") from None
    return text


class _Recipe:
    def __init__(self, path: Path, settings: dict[str, Setting]) -> None:
        self._path, self._settings = path, settings
        self._notes: list[str] = []
        known = {*_BASE, *_NOT_IN_BASE, *NO_COUNTERPART}
        for key, setting in settings.items():
            if key not in known:
                near = difflib.get_close_matches(key[:80], known, n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]}?" if near else ": remove the line, if training can do without it"
                raise ConfigError(f"{path}:{setting.line}: config.{key[:80]}: not a key of arcface_torch{hint}")

    def text(self) -> str:
        tree = self._tree()
        for key in self._settings:
            if key in NO_COUNTERPART:
                self._notes.append(f"{key} has no counterpart here: {NO_COUNTERPART[key]}")
        self._note_verbose()
        title = f"From arcface_torch's {ascii(self._path.name)[1:-1]}; docs/from_insightface.md tells what differs."
        lines = textwrap.wrap(title, 116)
        for note in self._notes:
            lines += textwrap.wrap(note, 114, initial_indent="- ", subsequent_indent="  ")
        return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(tree, sort_keys=False)

    def _tree(self) -> dict[str, dict[str, Any]]:
        workers, frequent = self._whole("num_workers"), self._whole("frequent")
        accumulation = self._whole("gradient_acc")
        if accumulation > 1:
            self._notes.append(
                "gradient_acc: theirs adds the gradients of micro-batches up, here their mean is taken: with sgd, "
                f"{accumulation} times the optim.lr makes the same steps (but for clipping)"
            )
        data: dict[str, Any] = {"threads": max(1, workers), "backend": "dali" if self._bool("dali") else "auto"}
        return {
            "data": {**self._records(), **data},
            "model": {"backbone": self._network(), "embedding_size": self._whole("embedding_size")},
            **self._augment(),
            "head": self._head(),
            "clustering": {"enabled": False},
            "optim": self._optim(),
            "train": {
                "output": self._output(),
                "precision": "bf16" if self._bool("fp16") else "fp32",
                **self._epochs(),
                "batch_size": self._whole("batch_size"),
                "accumulation": accumulation,
                "seed": self._whole("seed"),
                "log_steps": max(1, frequent // max(1, accumulation)),  # theirs counts micro-batches
            },
            "eval": {"sets": self._sets()},
        }

    def _records(self) -> dict[str, str]:
        if self._get("rec") in (None, "synthetic"):
            self._notes.append("rec names no records: set data.path (python -m data pack synthetic draws a set)")
            return {}
        return {"path": self._str("rec")}

    def _network(self) -> str:
        name = self._str("network")
        if name not in _NETWORKS:
            self._fail("network", f"a network that there is here, one of {', '.join(_NETWORKS)}")
        return _NETWORKS[name]

    def _augment(self) -> dict[str, dict[str, float]]:
        if not self._bool("dali_aug"):
            return {}
        if not self._bool("dali"):
            self._notes.append("dali_aug does nothing there without dali, and is left out")
            return {}
        self._notes.append("dali_aug: shares of the images as there; colours change in brightness too, not in hue")
        return {"augment": dict(_AUGMENT)}

    def _head(self) -> dict[str, Any]:
        margins = self._get("margin_list")
        if not isinstance(margins, tuple) or len(margins) != 3 or not all(map(_is_number, margins)):
            self._fail("margin_list", "three numbers (m1, m2, m3)")
        m1, m2, m3 = (float(m) for m in margins)  # type: ignore[arg-type]  # numbers, as seen above
        if (m1, m3) == (1, 0):
            loss = {"loss": "arcface", "margin": m2}
        elif (m1, m2) == (1, 0):
            loss = {"loss": "cosface", "margin": m3}
        else:
            loss = {"loss": "combined", "m1": m1, "margin": m2, "m3": m3}
        if loss["loss"] != "combined":
            self._notes.append("gradients are exact here; head.straight_through: true makes them theirs")
        return {
            **loss,
            "scale": 64.0,
            "sample_rate": self._float("sample_rate"),
            "interclass_filter": self._float("interclass_filtering_threshold"),
        }

    def _optim(self) -> dict[str, Any]:
        name = self._str("optimizer")
        if name == "adamw" and "momentum" in self._settings:
            self._notes.append("momentum: read with sgd only; adamw has 0.9 there and here")
        return {
            "name": name,
            "lr": self._float("lr"),
            "reference_batch": 0,  # theirs takes lr as it is, for any number of GPUs
            "momentum": self._float("momentum") if name == "sgd" else 0.9,
            "weight_decay": self._float("weight_decay"),
            "schedule": "polynomial",
            "warmup_epochs": self._float("warmup_epoch") if self._get("warmup_epoch") is not None else 0.0,
        }

    def _epochs(self) -> dict[str, int]:
        if self._get("num_epoch") is None:
            self._notes.append("num_epoch is not set: train.epochs is what is usual here")
            return {}
        return {"epochs": self._whole("num_epoch")}

    def _output(self) -> str:
        return f"runs/{self._path.stem}" if self._get("output") is None else self._str("output")

    def _sets(self) -> list[str]:
        names = self._get("val_targets") or ()
        if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
            self._fail("val_targets", "a list of names")
        return [f"{name}.bin" for name in names]

    def _note_verbose(self) -> None:
        steps, images, batch = self._get("verbose"), self._get("num_image"), self._get("batch_size")
        if all(isinstance(n, int) and n > 0 for n in (steps, images, batch)):
            each = steps * batch / images  # type: ignore[operator]  # numbers, as seen in the line before
            self._notes.append(f"to verify as often as there, set eval.every_epochs to {each:.3g} x GPUs")

    def _get(self, key: str) -> Value:
        setting = self._settings.get(key)
        return _BASE.get(key) if setting is None else setting.value

    def _whole(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            self._fail(key, "a whole number")
        return value

    def _float(self, key: str) -> float:
        value = self._get(key)
        if not _is_number(value):
            self._fail(key, "a number")
        return float(value)  # type: ignore[arg-type]  # a number, as seen above

    def _bool(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            self._fail(key, "True or False")
        return value

    def _str(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            self._fail(key, "a text")
        return value

    def _fail(self, key: str, expected: str) -> NoReturn:
        line = f":{self._settings[key].line}" if key in self._settings else ""
        got = ascii(self._get(key))
        raise ConfigError(f"{self._path}{line}: config.{key}: expected {expected}, got {got:.80}")


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def write_new(out: Path, text: str) -> None:
    """Raises ConfigError where there is a file of that name, or it cannot be written."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        try:
            os.link(partial, out)  # unlike a rename it never replaces one
        finally:
            partial.unlink()
    except FileExistsError:
        raise ConfigError(f"{out}: expected no file there: name another") from None
    except OSError as error:
        raise ConfigError(f"{out}: cannot write it ({error.strerror})") from None
