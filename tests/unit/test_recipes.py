"""docs/recipes.md against the recipes: each is there, and memory and lengths are what they come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from training.doctor.finding import size_text
from training.doctor.memory import Sizes, plan

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "demo")


def _rows(heading: str) -> dict[str, list[str]]:
    """Cells by recipe, of the first table behind a heading of the page."""
    text = (ROOT / "docs/recipes.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n| recipe |")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("[").partition("]")[0]: rest for first, *rest in cells}


def test_every_recipe_is_told_of() -> None:
    assert sorted(_rows("What to expect")) == sorted(_rows("Memory and time")) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_memory_and_length(name: str) -> None:
    ranks, classes, images = (int(cell.replace(",", "")) for cell in _rows("What to expect")[name][:3])
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    most = Sizes(
        classes=classes, samples=images, ranks=ranks, own_classes=-(-classes // ranks), own_samples=-(-images // ranks)
    )
    found = plan(config, most, cuda=True)
    counted = [size_text(found.total("device")), size_text(found.total("host")), size_text(found.checkpoint)]
    length = f"{round(images * config.train.epochs / 1e6):,} million"
    assert _rows("Memory and time")[name] == [str(ranks), *counted, length]
