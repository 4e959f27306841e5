"""arcface_torch's configuration files become recipes; nothing in them is run, and nothing in them is passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from backbones import names
from configs.__main__ import main
from configs.from_insightface import _NETWORKS, NO_COUNTERPART, translated
from configs.load import load_config
from configs.schema import ConfigError, RunConfig

HEAD = "from easydict import EasyDict as edict\n\nconfig = edict()\n"
# Settings as in configs/wf42m_pfc03_40epoch_8gpu_vit_b.py there.
VIT_B: dict[str, Any] = {
    "margin_list": (1.0, 0.0, 0.4), "network": "vit_b_dp005_mask_005", "resume": False, "output": None,
    "embedding_size": 512, "sample_rate": 0.3, "fp16": True, "weight_decay": 0.1, "batch_size": 256,
    "gradient_acc": 12, "optimizer": "adamw", "lr": 0.001, "verbose": 2000, "dali": False, "rec": "/data/WebFace42M",
    "num_classes": 2059906, "num_image": 42474557, "num_epoch": 40, "val_targets": ["lfw", "cfp_fp"],
}  # fmt: skip


def _file(folder: Path, settings: dict[str, Any], more: str = "") -> Path:
    path = folder / "theirs.py"
    path.write_text(HEAD + "".join(f"config.{key} = {value!r}\n" for key, value in settings.items()) + more)
    return path


def _config(folder: Path, settings: dict[str, Any], more: str = "") -> tuple[RunConfig, str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(translated(_file(folder, settings, more)))
    return load_config(recipe), recipe.read_text()


# ---- what is translated --------------------------------------------------------------------------------------------


def test_a_published_file_becomes_the_recipe_that_is_here(tmp_path: Path) -> None:
    config, text = _config(tmp_path, VIT_B, "config.warmup_epoch = config.num_epoch // 10\n")
    ours = load_config(Path(__file__).parents[2] / "configs/webface42m_vit_b.yaml")
    for section in ("model", "optim"):
        assert getattr(config, section) == getattr(ours, section)
    assert (config.head.loss, config.head.margin, config.head.sample_rate) == ("cosface", 0.4, 0.3)
    assert config.head == ours.head
    assert config.train.epochs == ours.train.epochs == 40
    assert config.train.batch_size * config.train.accumulation * 8 == ours.train.global_batch
    assert config.data.path == "/data/WebFace42M"
    assert config.eval.sets == ("lfw.bin", "cfp_fp.bin")
    assert config.train.output == "runs/theirs"
    assert not config.clustering.enabled
    assert text.startswith("# From arcface_torch's theirs.py")
    assert "verbose has no counterpart" in text
    assert "eval.every_epochs to 0.0121 x GPUs" in text


def test_an_empty_file_has_the_values_of_their_base(tmp_path: Path) -> None:
    config, text = _config(tmp_path, {})
    assert config.model.backbone == "iresnet50"
    assert (config.head.loss, config.head.margin, config.head.sample_rate) == ("arcface", 0.5, 1.0)
    assert (config.optim.name, config.optim.lr, config.optim.reference_batch) == ("sgd", 0.1, 0)
    assert (config.optim.momentum, config.optim.weight_decay) == (0.9, 5e-4)
    assert (config.train.precision, config.train.batch_size, config.train.seed) == ("fp32", 128, 2048)
    assert "set data.path" in text
    assert "num_epoch is not set" in text


@pytest.mark.parametrize(
    ("key", "value", "section", "expected"),
    [
        ("margin_list", (1.0, 0.3, 0.0), "head", {"loss": "arcface", "margin": 0.3}),
        ("margin_list", [1, 0, 0.35], "head", {"loss": "cosface", "margin": 0.35}),
        ("margin_list", (1.2, 0.3, 0.1), "head", {"loss": "combined", "m1": 1.2, "margin": 0.3, "m3": 0.1}),
        ("interclass_filtering_threshold", 0.4, "head", {"interclass_filter": 0.4}),
        ("sample_rate", 1, "head", {"sample_rate": 1.0}),
        ("network", "mbf", "model", {"backbone": "mobilefacenet"}),
        ("embedding_size", 256, "model", {"embedding_size": 256}),
        ("lr", 0.02, "optim", {"lr": 0.02, "reference_batch": 0}),
        ("momentum", 0.8, "optim", {"momentum": 0.8}),
        ("weight_decay", 1e-4, "optim", {"weight_decay": 1e-4}),
        ("optimizer", "adamw", "optim", {"name": "adamw"}),
        ("warmup_epoch", 2, "optim", {"warmup_epochs": 2.0}),
        ("num_epoch", 25, "train", {"epochs": 25}),
        ("fp16", True, "train", {"precision": "bf16"}),
        ("batch_size", 64, "train", {"batch_size": 64}),
        ("gradient_acc", 5, "train", {"accumulation": 5, "log_steps": 2}),
        ("frequent", 30, "train", {"log_steps": 30}),
        ("seed", 7, "train", {"seed": 7}),
        ("output", "work/x", "train", {"output": "work/x"}),
        ("rec", "/data/ms1m", "data", {"path": "/data/ms1m"}),
        ("rec", "synthetic", "data", {"path": ""}),
        ("num_workers", 6, "data", {"threads": 6}),
        ("dali", True, "data", {"backend": "dali"}),
        ("val_targets", ["lfw"], "eval", {"sets": ("lfw.bin",)}),
    ],
)
def test_each_key(tmp_path: Path, key: str, value: Any, section: str, expected: dict[str, Any]) -> None:
    config, _ = _config(tmp_path, {key: value})
    assert {name: getattr(getattr(config, section), name) for name in expected} == expected


def test_dali_aug_acts_with_dali_only(tmp_path: Path) -> None:
    config, _ = _config(tmp_path, {"dali": True, "dali_aug": True})
    assert (config.augment.grey, config.augment.low_resolution, config.augment.blur) == (0.1, 0.1, 0.2)
    config, text = _config(tmp_path, {"dali_aug": True})
    assert config.augment.idle
    assert "dali_aug does nothing there without dali" in text


@pytest.mark.parametrize("key", NO_COUNTERPART)
def test_what_has_no_counterpart_is_told_and_no_value_copied(tmp_path: Path, key: str) -> None:
    _, text = _config(tmp_path, {key: "s3cret"})
    assert f"- {key} has no counterpart here: " in text
    assert "s3cret" not in text


def test_every_network_is_one_of_ours() -> None:
    assert set(_NETWORKS.values()) <= set(names())


def test_what_stands_later_counts_and_arithmetic_of_numbers_is_done(tmp_path: Path) -> None:
    more = '"""words"""\nconfig.num_epoch = 5 * 4\nconfig.warmup_epoch = -(-config.num_epoch) / 8 - 0.5\n'
    more += "config.lr = 1e-1 + 0\n"
    config, _ = _config(tmp_path, {"num_epoch": 3}, more)
    assert (config.train.epochs, config.optim.warmup_epochs, config.optim.lr) == (20, 2.0, 0.1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = _file(tmp_path, VIT_B), tmp_path / "new" / "recipe.yaml"
    assert main(["from-insightface", str(path)]) == 0
    printed = capsys.readouterr().out
    assert main(["from-insightface", str(path), "--out", str(out)]) == 0
    assert out.read_text() == printed
    assert [name.name for name in out.parent.iterdir()] == ["recipe.yaml"]
    assert main(["from-insightface", str(path), "--out", str(out)]) == 2
    assert "expected no file there" in capsys.readouterr().err
    assert main(["from-insightface", str(tmp_path / "none.py")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["from-insightfaces"])
    assert capsys.readouterr().err.startswith("error: ")


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "config.margins = (1, 2, 3)",
            "theirs.py:4: config.margins: not a key of arcface_torch; did you mean margin_list",
        ),
        ("config.loss = 'cosface'", "theirs.py:4: config.loss: not a key of arcface_torch"),
        ("config.__class__ = 3", "theirs.py:4: config.__class__: not a key of arcface_torch"),
        ("config.network = 'r2060'", "theirs.py:4: config.network: expected a network that there is here, one of r18"),
        ("config.margin_list = (1.0, 0.5)", "config.margin_list: expected three numbers"),
        ("config.margin_list = (1.0, True, 0.5)", "config.margin_list: expected three numbers"),
        ("config.batch_size = 12.5", "config.batch_size: expected a whole number, got 12.5"),
        ("config.batch_size = True", "config.batch_size: expected a whole number, got True"),
        ("config.batch_size = 1", "theirs.py: train.batch_size: expected at least 2"),
        ("config.lr = 'fast'", "config.lr: expected a number, got 'fast'"),
        ("config.lr = -1", "theirs.py: optim.lr: expected more than 0"),
        ("config.fp16 = 1", "config.fp16: expected True or False, got 1"),
        ("config.rec = ['a', 'b']", "config.rec: expected a text"),
        ("config.rec = 's3://key:secret@host/x'", "data.path: "),
        ("config.val_targets = 'lfw'", "config.val_targets: expected a list of names"),
        ("config.optimizer = 'lion'", "optim.name: expected sgd or adamw"),
        ("config.warmup_epoch = config.num_epoch // 10", "theirs.py:4: config.num_epoch is read before it is set"),
        ("config.lr = 1 / 0", "theirs.py:4: cannot compute it (division by zero)"),
        ("config.lr = 1 +", "theirs.py:4: not Python (invalid syntax)"),
    ],
)
def test_a_value_that_cannot_be_taken_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        translated(_file(tmp_path, {}, line + "\n"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "from os import system as edict",
        "from .easydict import EasyDict",
        "open(CANARY, 'w')",
        "config.lr = open(CANARY, 'w')",
        "config.rec = __import__('os').system('touch ' + CANARY)",
        "config.rec = f'{open(CANARY, \"w\")}'",
        "config.rec = 'a' * 10",
        "config.rec = 'a' + 'b'",
        "config.rec = 'a' % 3",
        "config.lr = 2 ** 999999999",
        "config.lr = 1 << 99999999",
        "config.lr = 99999999999999999999 * 99999999999999999999",
        "config.lr = 1e308 * 10",
        "config.lr = " + "9" * 5000,
        "config.lr = 1j",
        "config.lr = b'1'",
        "config.lr = ...",
        "config.lr = config.__class__.__subclasses__",
        "config.__class__.__base__ = 1",
        "config['lr'] = 1",
        "config.lr: float = 1",
        "config.lr += 1",
        "config.lr = config.seed = 1",
        "a, config.lr = 1, 2",
        "other.lr = 1",
        "lr = 1",
        "config.lr = (lambda: 1)()",
        "config.lr = [x for x in (1, 2)]",
        "config.lr = 1 if True else 2",
        "config.lr = {'a': 1}",
        "config.lr = (x := 1)",
        "config = edict({'lr': 1})",
        "config = edict(lr=open(CANARY, 'w'))",
        "config = open(CANARY, 'w')",
        "for config.lr in (1, 2): pass",
        "while True: pass",
        "def edict(): open(CANARY, 'w')",
        "class edict:\n    x = open(CANARY, 'w')",
        "@open(CANARY, 'w')\ndef f(): pass",
        "if True:\n    config.lr = 1",
        "try:\n    pass\nfinally:\n    pass",
        "assert open(CANARY, 'w')",
        "del config.lr",
        "config.lr = " + "-" * 40 + "1",
        "config.lr = " + "-" * 9000 + "1",
        "config.lr = " + "(" * 9000 + "1" + ")" * 9000,
        "config.lr = " + "[" * 150 + "]" * 150,
        "config.lr = " + "1+" * 5000 + "1",
        "config.lr = config" + ".a" * 7000,
        "config.lr = (" + "1," * 100 + ")",
        "config.lr = 1\x00",
        "config.rec = '" + "x" * 20000 + "'",
        "config.lr = " + "not " * 4000 + "1",
    ],
    ids=range(54),
)  # fmt: skip
def test_code_is_refused_in_one_line_and_never_run(tmp_path: Path, code: str) -> None:
    canary = tmp_path / "canary"
    path = _file(tmp_path, {}, code.replace("CANARY", repr(str(canary))) + "\n")
    with pytest.raises(ConfigError) as error:
        translated(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 400
    assert not canary.exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.py"
    path.write_bytes(b"config.rec = '\xff'\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        translated(path)


@pytest.mark.parametrize("text", ["a: 1\n!!python/object:os.system", "\u2028# x", "'\"\\", "{}: []", "#"])
def test_texts_stay_values_in_the_recipe(tmp_path: Path, text: str) -> None:
    config, written = _config(tmp_path, {"rec": text, "output": text})
    assert (config.data.path, config.train.output) == (text, text)
    assert yaml.safe_load(written)["data"]["path"] == text
