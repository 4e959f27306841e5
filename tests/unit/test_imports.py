"""Who may import whom, read from the code: packages stay apart, one file opens process groups, none needs mxnet."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "configs": {"configs"},
    "sharding": set(),
    "data": {"configs", "sharding", "data"},
    "backbones": {"configs", "sharding", "backbones"},
    "partial_fc": {"configs", "sharding", "partial_fc"},
    "clustering": {"configs", "sharding", "partial_fc", "clustering"},
    "evaluation": {"configs", "sharding", "data", "backbones", "evaluation"},
    "training": {
        "configs",
        "sharding",
        "data",
        "backbones",
        "partial_fc",
        "clustering",
        "evaluation",
        "training",
    },
    "train_dist": {"configs", "training"},
    "docker": {"configs", "docker"},
}
COMMANDS = {
    "clustering/commands": {"data", "training"},
    "evaluation/__main__.py": {"training"},
}
"""Command lines: they may read records and, as train_dist.py does, open their process group through training."""
SOURCES = sorted(
    path for name in ALLOWED for path in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")] if path.is_file()
)


def _imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_within_the_rules(path: Path) -> None:
    place = path.relative_to(ROOT)
    allowed = ALLOWED[place.parts[0].removesuffix(".py")].union(
        *(more for command, more in COMMANDS.items() if place.is_relative_to(command))
    )
    names = {name.split(".")[0] for name in _imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert names & set(ALLOWED) <= allowed, f"{place} may only import {sorted(allowed)}"
    assert "mxnet" not in names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_do_not_import_their_command_lines(path: Path) -> None:
    place = path.relative_to(ROOT)
    if place.name == "__main__.py" or any(place.is_relative_to(command) for command in COMMANDS):
        return
    names = _imports(ast.parse(path.read_text(encoding="utf-8")))
    assert not [name for name in names if name.startswith("clustering.commands")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_training_opens_or_assumes_a_process_group(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() == "training/distributed.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"init_process_group", "destroy_process_group", "WORLD"}


def test_schema_and_sharding_import_nothing_of_ours() -> None:
    for name, own in (("configs/schema.py", {"configs"}), ("configs/head.py", {"configs"}), ("sharding.py", set())):
        names = {n.split(".")[0] for n in _imports(ast.parse((ROOT / name).read_text(encoding="utf-8")))}
        assert not names & (set(ALLOWED) - own)


def test_every_source_file_is_one_short_idea() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in SOURCES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 350
    }
    assert not long


def test_every_test_file_is_collected(pytestconfig: pytest.Config) -> None:
    """Pytest passes over some folders by their names, without a word."""
    passed_over = pytestconfig.getini("norecursedirs")
    found = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    assert {path.parts[1] for path in found} >= {"dist", "gpu", "integration", "unit"}
    for path in found:
        assert not [part for part in path.parts for name in passed_over if fnmatch(part, name)], path
