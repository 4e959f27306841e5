"""Names and signatures of the public modules are those that are kept in the repository."""

from __future__ import annotations

import difflib
import importlib
import re

import pytest

from scripts.docs import public


def test_the_public_names_and_signatures_are_as_listed() -> None:
    listed, found = public.LISTING.read_text(encoding="utf-8").splitlines(), public.listing().splitlines()
    changed = [line for line in difflib.unified_diff(listed, found, lineterm="", n=0) if line[0] in "+-"][2:]
    assert changed == [], (
        "the public names changed: if that is meant, say so in CHANGELOG.md and run `python -m scripts.docs.public`"
    )


@pytest.mark.parametrize("module", public.modules())
def test_public_modules_can_be_imported_and_say_what_they_are(module: str) -> None:
    found = importlib.import_module(module)
    assert found.__doc__
    names = [line.split("(")[0].split(" ")[-1] for line in public.listing().splitlines() if f"{module}." in line]
    assert names, "a public module has public names"


def test_a_changed_signature_is_seen() -> None:
    listing = public.listing()
    assert "partial_fc.module.PartialFC(nn.Module)" in listing
    assert "@property" in listing
    names = [re.sub(r"^(@\S+\([^)]*\) |@\S+ )+", "", line).split("(")[0].split(":")[0] for line in listing.splitlines()]
    private = [name for name in names if re.search(r"\._(?!_)", name)]
    assert private == []
