"""CITATION.cff and the cards say what they must, and agree with the package."""

from __future__ import annotations

import datetime
import re

import yaml

from tests.docs.blocks import ROOT

NEEDED = {"cff-version", "message", "title", "authors"}
KEYS = NEEDED | {"type", "version", "date-released", "license", "abstract", "keywords"}


def test_the_citation_has_what_its_format_asks_for_and_agrees_with_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert set(cited) <= KEYS
    assert set(cited) >= NEEDED
    assert cited["cff-version"] == "1.2.0"
    assert all(author.get("name") or author.get("family-names") for author in cited["authors"])
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for key in ("version", "license"):
        (found,) = re.findall(rf'^    {key}="([^"]+)"', setup, re.M)
        assert cited[key] == found
    assert isinstance(cited["date-released"], datetime.date)


def test_the_cards_name_what_was_not_measured_and_what_was_withdrawn() -> None:
    model = (ROOT / "docs/model_card.md").read_text(encoding="utf-8")
    data = (ROOT / "docs/data_card.md").read_text(encoding="utf-8")
    for heading in ("## Meant for", "## Not meant for", "## What was not measured", "## Before a model is used"):
        assert heading in model
    for heading in ("## Consent and law", "## Sets of others"):
        assert heading in data
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        named = re.match(r"[a-z]+", recipe.stem)
        assert named
        assert recipe.stem == "demo" or re.search(named[0], data, re.I), f"the data card says nothing of {recipe.name}"
