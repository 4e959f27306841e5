"""What README.md, the tutorial and the page on the head ask a reader to type works, and prints what they show.

Blocks are collected from the pages, so none can be forgotten: each is executed here, or stands in `NOT_RUN` with a
reason.
`INSTEAD` says where a test takes something smaller; nothing else is changed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docs.blocks import ROOT, Block, blocks_of
from tests.docs.runner import Place, missing
from tests.forked import Forks

PAGES = ("README.md", "docs/tutorial.md", "docs/head.md")
NOT_RUN = {
    "make demo": "up to ten minutes; tests/integration/test_demo.py runs it on a small set",
    "make test": "is what runs this test",
    "make setup": "made the environment that runs this test",
    ". .venv/bin/activate": "the same",
}
"""Command to reason."""


class Instead(NamedTuple):
    """What a test takes in place of what a page says, in commands and in what they print."""

    page: str
    says: str
    takes: str
    why: str


TINY = (
    "--set model.backbone=small --set model.embedding_size=16 --set train.precision=fp32 --set train.epochs=1 "
    "--set train.batch_size=24 --set head.scale=16 --set train.cpu_threads=1 --set data.threads=1 --set eval.sets=[] "
    "--set train.checkpoints=runs/other"
)
INSTEAD = (
    Instead("README.md", "--nproc_per_node=8", "--nproc_per_node=2", "two ranks in place of eight"),
    Instead("README.md", "/data/ms1m-retinaface-t1", "sets/mine", "24 drawn identities in place of MS1MV3"),
    Instead("README.md", "data.path=sets/mine", f"data.path=sets/mine {TINY}", "a network that two cores can train"),
    Instead("README.md", "--k 100000", "--k 24", "as many clusters as there are identities"),
    Instead("README.md", "--k 1000 ", "--k 24 ", "the same"),
    Instead("docs/tutorial.md", "PERSONS, PHOTOS = 200, 15", "PERSONS, PHOTOS = 32, 12", "fewer photos"),
    Instead(
        "docs/tutorial.md", "--verification-identities 40", "--verification-identities 12 --pairs 300", "fewer pairs"
    ),
    Instead("docs/tutorial.md", ", tar@far=1e-3 0.8%", "", "which cannot measure such a rate"),
    Instead("docs/tutorial.md", ", tar@far=1e-3 25.1%", "", "the same"),
    Instead(
        "docs/tutorial.md",
        "--out runs/tutorial/run/evaluation",
        "--out runs/tutorial/run/evaluation --resamples 100",
        "rougher intervals",
    ),
    Instead("docs/tutorial.md", "epochs: 10", "epochs: 3", "a shorter training"),
    Instead("docs/tutorial.md", "every_epochs: 5", "every_epochs: 3", "the same"),
)


def smaller(page: str, text: str) -> str:
    """The text of a page with what a test takes instead."""
    for each in INSTEAD:
        if each.page == page:
            text = text.replace(each.says, each.takes)
    return text


def test_every_exception_is_needed() -> None:
    """What is excepted or replaced stands on the page."""
    for each in INSTEAD:
        page = (ROOT / each.page).read_text(encoding="utf-8")
        assert each.says in page or any(each.says in other.takes for other in INSTEAD), each
    commands = {command for page in PAGES for block in blocks_of(page) if block.kind == "commands"
                for command, _ in block.commands()}  # fmt: skip
    assert set(NOT_RUN) <= commands


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Place:
    """What README.md takes as given: the demo's set and run, and a set and a run of the reader's own."""
    place = Place(tmp_path_factory.mktemp("readme"), forks)
    place.run(
        "python -m data pack synthetic --out runs/demo/data --workers 1 --seed 3 --identities 24 "
        "--images-per-identity 8 --verification-identities 12 --pairs 400"
    )
    short = "--set train.epochs=2 --set train.batch_size=12 --set optim.warmup_epochs=0 --set train.log_steps=4"
    place.run(f"torchrun --nproc_per_node=2 train_dist.py --config configs/demo.yaml {short}")
    (plain,) = re.findall(r"`(\S+torchrun [^`]*runs/demo/plain)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    place.run(f"{' '.join(plain.split())} {short}")
    for name, target in (("sets/mine", "runs/demo/data"), ("runs/mine", "runs/demo/run")):
        (place.folder / name).parent.mkdir(exist_ok=True)
        (place.folder / name).symlink_to(place.folder / target)
    return place


@pytest.mark.skipif(
    "CLUSTERFACE_TEST_DOCS" not in os.environ, reason="`make test-docs` runs it: half a minute of a core"
)
def test_readme(checkout: Place) -> None:
    """Numbers are those of the whole demo there, of a small one here."""
    assert run_page("README.md", checkout, numbers=False) >= 13


def test_tutorial(tmp_path: Path, forks: Forks) -> None:
    assert run_page("docs/tutorial.md", Place(tmp_path, forks), numbers=False) >= 10


def test_the_head_in_a_loop_of_one_s_own(tmp_path: Path, forks: Forks) -> None:
    assert run_page("docs/head.md", Place(tmp_path, forks), numbers=False) == 1


def run_page(page: str, place: Place, *, numbers: bool) -> int:
    """Execute its blocks in order. Returns how many commands and Python blocks were executed."""
    count, printed = 0, ""
    for block in blocks_of(page):
        at = f"{page}:{block.line}"
        if block.kind == "file":
            place.write(block.title, smaller(page, block.text))
        elif block.kind == "python":
            printed, count = place.python(smaller(page, block.text)), count + 1
        elif block.kind == "commands":
            for command, expected in block.commands():
                if command in NOT_RUN:
                    continue
                printed, count = place.run(smaller(page, command)), count + 1
                shown = [smaller(page, line) for line in expected]
                assert missing(printed, shown, numbers=numbers) == [], f"{at}: {command} printed\n{printed}"
        elif block.kind == "output" and page != "README.md":
            assert missing(printed, block.text.splitlines(), numbers=numbers) == [], f"{at}: printed was\n{printed}"
    return count


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind(page: str) -> None:
    assert list(blocks_of(page))


def test_a_page_whose_output_changed_is_found() -> None:
    shown = ["centres.npy: 24 centres of 16 components; mean cosine 0.9", "…"]
    assert missing("centres.npy: 24 centres of 16 components; mean cosine 0.8", shown, numbers=False) == []
    assert missing("centres.npy: 24 centres of 16 components; mean cosine 0.8", shown, numbers=True) == shown[:1]
    assert missing("centres.npy: 24 clusters of 16 components", shown, numbers=False) == shown[:1]
    block = Block("page", 1, "commands", "$ python a.py --x \\\n  3\none\n$ python b.py\n")
    assert block.commands() == [("python a.py --x 3", ["one"]), ("python b.py", [])]
