"""Configuration: recipes load, overrides win, and every mistake is named in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from configs.load import load_config, to_dict, to_yaml
from configs.schema import ConfigError, RunConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config
    assert config != RunConfig()


def test_the_issue_names_these_recipes() -> None:
    assert {"demo.yaml", "ms1mv3_r50.yaml", "glint360k_r100.yaml"} <= {path.name for path in RECIPES}


def test_overrides_win_and_take_yaml_values() -> None:
    config = load_config(
        ROOT / "configs/demo.yaml",
        [
            "train.epochs=5",
            "optim.lr=1e-3",
            "head.scale=16",
            "clustering.enabled=false",
            "eval.sets=[a.bin, b.bin]",
            "train.epochs=6",
        ],
    )
    assert config.train.epochs == 6
    assert config.optim.lr == 1e-3
    assert config.head.scale == 16.0
    assert isinstance(config.head.scale, float)
    assert config.clustering.enabled is False
    assert config.eval.sets == ("a.bin", "b.bin")


def test_what_another_setting_allows() -> None:
    assert load_config(None, ["clustering.hard_negatives=8", "head.sample_rate=0.1"]).clustering.hard_negatives == 8
    assert load_config(None, ["clustering.hard_negatives=8", "clustering.enabled=false"]).head.sample_rate == 1
    assert load_config(None, ["clustering.margin_rule=kappaface", "head.margin=0.8"]).head.margin == 0.8


@pytest.mark.parametrize(
    "text",
    ["2024-11-24", "2024-13-45", "123", "1_000", "0x1F", "1:30", "on", "1.50", "a: b", "set #1", "@x", "{a", "*x"],
)
def test_overrides_of_text_are_taken_as_written(text: str) -> None:
    config = load_config(None, [f"train.output={text}", f"data.path = {text} ", f"model.backbone='{text}'"])
    assert (config.train.output, config.data.path, config.model.backbone) == (text, text, text)


def test_the_largest_seed() -> None:
    assert load_config(None, [f"train.seed={2**63 - 1}"]).train.seed == 2**63 - 1


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    path = tmp_path / "x.yaml"
    path.write_text("data: {path: ~/faces}\ntrain: {output: ~/runs/~a}\neval: {sets: [~/lfw.bin, b~.bin]}\n")
    config = load_config(path, ["model.backbone=~/net"])
    assert (config.data.path, config.train.output) == ("/home/ann/faces", "/home/ann/runs/~a")
    assert config.eval.sets == ("/home/ann/lfw.bin", "b~.bin")
    assert config.model.backbone == "~/net"
    assert load_config(None, ["clustering.start=~/a.npy"]).clustering.start == "/home/ann/a.npy"
    overrides = ["data.path=~/faces", "train.output=~/runs/~a", "eval.sets=[~/lfw.bin, b~.bin]", "model.backbone=~/net"]
    assert load_config(None, overrides) == config


def test_a_single_name_is_a_list_of_one() -> None:
    assert load_config(None, ["eval.sets=lfw.bin"]).eval.sets == ("lfw.bin",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=5", "train.epoch: unknown setting; did you mean train.epochs?"),
        ("trian.epochs=5", "trian: unknown setting; did you mean train?"),
        ("train.zzzzzz=5", "train.zzzzzz: unknown setting; known: output, device"),
        ("train.epochs", "expected section.field=value"),
        ("epochs=5", "expected section.field=value"),
        ("train.epochs=five", "train.epochs: expected a whole number, got 'five'"),
        ("train.epochs=2.5", "train.epochs: expected a whole number, got 2.5"),
        ("train.epochs=true", "train.epochs: expected a whole number, got True"),
        ("train.epochs=0", "train.epochs: expected at least 1, got 0"),
        ("train.epochs=2024-13-45", "train.epochs: expected a whole number, got '2024-13-45'"),
        ("train.seed=-1", "train.seed: expected 0 to 2^63 - 1, got -1"),
        ("train.seed=9223372036854775808", "train.seed: expected 0 to 2^63 - 1, got 9223372036854775808"),
        ("train.resume=1", "train.resume: expected true or false, got 1"),
        ("train.batch_size=1", "train.batch_size: expected at least 2"),
        ("optim.lr=fast", "optim.lr: expected a finite number, got 'fast'"),
        ("optim.lr=-1", "optim.lr: expected more than 0, got -1.0"),
        ("optim.lr=nan", "optim.lr: expected a finite number, got nan"),
        ("optim.lr=.inf", "optim.lr: expected a finite number, got inf"),
        ("optim.clip_norm=-.inf", "optim.clip_norm: expected a finite number, got -inf"),
        ("optim.weight_decay=.nan", "optim.weight_decay: expected a finite number, got nan"),
        ("clustering.shrinkage=1e999", "clustering.shrinkage: expected a finite number, got inf"),
        ("eval.every_epochs=1" + 400 * "0", "eval.every_epochs: expected a finite number, got 1000"),
        ("optim.name=lion", "optim.name: expected sgd or adamw, got 'lion'"),
        (
            "head.loss=softmax",
            "head.loss: expected arcface, cosface, combined, magface, adaface or curricularface, got 'softmax'",
        ),
        ("head.m1=2", "head.m1: expected 1 to 8; 1 unless combined, got 2.0"),
        ("head.m3=0.1", "head.m3: expected 0 <= m3 < 1; 0 unless combined, got 0.1"),
        ("head.interclass_filter=1", "head.interclass_filter: expected 0 (off) to below 1, got 1.0"),
        ("head.sample_rate=0", "head.sample_rate: expected 0 < sample_rate <= 1, got 0.0"),
        ("head.scale=128.5", "head.scale: expected 0 < scale <= 128"),
        ("head.chunk_classes=10", "head.chunk_classes: unknown setting"),
        ("head.margin=0.9", "head.margin: expected within clustering.margin_low"),
        ("clustering.step_budget=1", "clustering.step_budget: expected 0 (no limit) to below 1, got 1.0"),
        ("clustering.step_budget=-0.1", "clustering.step_budget: expected 0 (no limit) to below 1, got -0.1"),
        ("clustering.hard_negatives=-1", "clustering.hard_negatives: expected 0 or more, got -1"),
        (
            "clustering.hard_negatives=8",
            "clustering.hard_negatives: expected 0, as head.sample_rate=1 draws every class",
        ),
        ("clustering.margin_rule=magface", "clustering.margin_rule: expected hard_level or kappaface, got 'magface'"),
        ("clustering.direction=2", "clustering.direction: expected -1, 0 or 1, got 2"),
        ("clustering.temperature=0.001", "clustering.temperature: expected more than 0.02"),
        ("clustering.margin_low=0.9", "clustering.margin_low, margin_high: expected"),
        ("data.backend=mxnet", "data.backend: expected auto, dali or cpu, got 'mxnet'"),
        ("data.sampler=random", "data.sampler: expected shuffle, windows, balanced or identities, got 'random'"),
        ("data.images_per_identity=1", "data.images_per_identity: expected at least 2, got 1"),
        ("tensorboard.sheet_classes=-1", "tensorboard.sheet_classes: expected 0 (none) to 50, got -1"),
        ("tensorboard.projector_images=1e9", "tensorboard.projector_images: expected a whole number, got"),
        ("tensorboard.projector_images=10001", "tensorboard.projector_images: expected 0 (none) to 10000, got 10001"),
        ("profile.steps=-1", "profile.steps: expected 0 (none) to 100, got -1"),
        ("profile.steps=20:30", "profile.steps: expected 0 (none) to 100, got 1230"),
        ("profile.after=1", "profile.after: expected at least 2, got 1"),
        ("profile.all_ranks=yep", "profile.all_ranks: expected true or false, got 'yep'"),
        ("profile.step=3", "profile.step: unknown setting; did you mean profile.steps?"),
        ("eval.sets=[1]", "eval.sets: expected a list of names, got [1]"),
        ("eval.sets={a", "not valid YAML"),
        ("model.backbone=null", "model.backbone: expected text, in quotes where"),
    ],
)
def test_every_mistake_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected sections"),
        ("train: 5\n", "train: expected a section with fields, got 5"),
        ("train: {epochs: [\n", "not valid YAML"),
        ("train: {output: 2024-13-45}\n", "not valid YAML: month must be in 1..12"),
        (
            "train: {output: 2024-11-24}\n",
            "train.output: expected text, in quotes where YAML takes it for something else",
        ),
        ("data: {path: 123}\n", "data.path: expected text, in quotes where YAML takes it for something else, got 123"),
        ("optim: {lr: .inf}\n", "optim.lr: expected a finite number, got inf"),
        ("data: {path: zo\xeb}\n", "x.yaml: not UTF-8 text (invalid continuation byte at byte 15)"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read it"):
        load_config(Path("nowhere.yaml"))


def test_empty_sections_and_files_are_defaults(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("train:\n")
    assert load_config(path) == RunConfig() == load_config(None)


def test_every_field_has_a_docstring_or_a_plain_name() -> None:
    """The schema is the settings' reference: only names that speak for themselves go without a sentence."""
    plain = {
        "length_high",
        "margin_low",
        "margin_high",
        "epochs",
        "seed",
        "momentum",
        "weight_decay",
        "name",
        "batch_size",
    }
    files = ("configs/guard.py", "configs/head.py", "configs/augment.py", "configs/data.py", "configs/schema.py",
             "configs/clustering.py", "configs/monitor.py", "configs/showing.py")  # fmt: skip
    source = "".join((ROOT / name).read_text() for name in files)
    for section in dataclasses.fields(RunConfig):
        for field in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            after = source.split(f"\n    {field.name}: ", 1)[1].split("\n", 2)[1]
            assert after.lstrip().startswith('"""') or field.name in plain, f"{section.name}.{field.name}"


def test_to_dict_is_plain_yaml() -> None:
    assert yaml.safe_load(to_yaml(RunConfig())) == to_dict(RunConfig())
