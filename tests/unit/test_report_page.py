"""The report's page: what strangers named is text in it, nothing is loaded, limits are said, pictures are optional."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from clustering.commands.page import COPY_ROWS, NOISE_ROWS, View, render
from clustering.report.findings import Copy, Duplicate, Findings, LabelState, Noise, Split
from clustering.report.groups import Cut

EVIL = "</style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Elements and attributes, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def findings(noise: int = 2, copies: int = 2) -> Findings:
    return Findings(
        noise=[Noise(1.5, n, 0, "closed", 1, -0.25, 1.25, True) for n in range(noise - 1)]
        + [Noise(0.125, 99, 0, "open", -1, 0.25, 0.125, False)],
        duplicates=[Duplicate(0.6, 0, 2, 0.96875, 8, 7)],
        splits=[Split(0.75, 1, 1, 2, (4, 5, 6), 9)],
        copies=[Copy(0.996, n, 1, 3, 2, False) for n in range(copies)],
        labels=[LabelState(1, 10, 0.5, 0.75, 0.25, 2, 1, 0)],
        cut=Cut(within=0.6, across=0.0, stranger=0.3),
        noise_from=0.1,
        split=0.6,
        duplicate=0.9,
        iterations=4,
    )


def view(picture: bytes | None = b"jpeg", *, pictures: bool = True) -> View:
    return View(
        title=f"Report on {EVIL}",
        facts=[("set", EVIL)],
        warnings=[EVIL],
        samples_of=lambda label: [10 * label, 10 * label + 1],
        name_of=lambda label: EVIL if label else "",
        thumbnail=(lambda sample: picture) if pictures else None,
        clean=f"clean {EVIL}",
    )


def test_names_of_strangers_are_text() -> None:
    page = render(findings(), view())
    read = Reader(page)
    assert "script" not in {tag for tag, _ in read.elements}
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8
    assert "alert(1)</script>" not in page


def test_nothing_is_loaded_and_the_policy_allows_the_style_alone() -> None:
    page = render(findings(), view())
    read = Reader(page)
    policy = next(a["content"] for tag, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    sources = [attributes["src"] for tag, attributes in read.elements if tag == "img"]
    assert len(sources) > 10
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all((a.get("href") or "#").startswith("#") for _, a in read.elements)
    assert not [a for _, a in read.elements if "style" in a]
    assert "prefers-color-scheme: dark" in style[1]


@pytest.mark.parametrize("view_", [view(None), view(pictures=False)], ids=["not decodable", "without records"])
def test_without_pictures_the_samples_numbers_stand_there(view_: View) -> None:
    read = Reader(page := render(findings(), view_))
    assert "img" not in {tag for tag, _ in read.elements}
    assert '<span class="none suspect">99</span>' in page


def test_limits_are_said() -> None:
    page = render(findings(noise=NOISE_ROWS + 1, copies=COPY_ROWS + 5), view())
    assert f"the first {NOISE_ROWS} of {NOISE_ROWS + 1}; all are in noise.csv" in page
    assert f"the first {COPY_ROWS} of {COPY_ROWS + 5}; all are in copies.csv" in page
    assert page.count("<article>") == NOISE_ROWS + 2


def test_no_findings_are_a_page_too() -> None:
    nothing = Findings(
        noise=[], duplicates=[], splits=[], copies=[], labels=[], cut=Cut(within=0.6, across=0.0, stranger=0.3),
        noise_from=0.0, split=0.6, duplicate=0.9, iterations=1,
    )  # fmt: skip
    page = render(nothing, view())
    Reader(page)
    assert page.count("None found.") == 4
