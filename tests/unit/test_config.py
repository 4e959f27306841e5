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
        ("train.resume=1", "train.resume: expected true or false, got 1"),
        ("train.batch_size=1", "train.batch_size: expected at least 2"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("optim.lr=-1", "optim.lr: expected more than 0, got -1.0"),
        ("optim.lr=nan", "optim.lr: expected more than 0, got nan"),
        ("optim.name=lion", "optim.name: expected sgd or adamw, got 'lion'"),
        ("head.loss=softmax", "head.loss: expected arcface or cosface, got 'softmax'"),
        ("head.sample_rate=0", "head.sample_rate: expected 0 < sample_rate <= 1, got 0.0"),
        ("head.margin=0.9", "head.margin: expected within clustering.margin_low"),
        ("clustering.direction=2", "clustering.direction: expected -1, 0 or 1, got 2"),
        ("clustering.temperature=0.001", "clustering.temperature: expected more than 0.02"),
        ("clustering.margin_low=0.9", "clustering.margin_low, margin_high: expected"),
        ("data.backend=mxnet", "data.backend: expected auto, dali or cpu, got 'mxnet'"),
        ("eval.sets=[1]", "eval.sets: expected a list of names, got [1]"),
        ("data.path={a", "not valid YAML"),
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
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
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
    plain = {"epochs", "seed", "momentum", "weight_decay", "name", "batch_size"}
    source = (ROOT / "configs/schema.py").read_text()
    for section in dataclasses.fields(RunConfig):
        for field in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            after = source.split(f"\n    {field.name}: ", 1)[1].split("\n", 2)[1]
            assert after.lstrip().startswith('"""') or field.name in plain, f"{section.name}.{field.name}"


def test_to_dict_is_plain_yaml() -> None:
    assert yaml.safe_load(to_yaml(RunConfig())) == to_dict(RunConfig())
