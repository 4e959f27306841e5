"""Small sets in the shape of IJB, and the files that they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Case(NamedTuple):
    """N images of templates, which are of persons; pairs and their truths; two galleries and probes (ids)."""

    x_ND: Array
    template_N: Array
    media_N: Array
    score_N: Array
    pairs_P2: Array
    same_P: Array
    galleries: list[Array]
    probes: Array
    person: dict[int, int]


def made_up(persons: int = 12, *, dim: int = 16, noise: float = 1.0, seed: int = 0, pairs: int = 900) -> Case:
    """Four templates a person, of which half of the persons are in either gallery; ids that are neither dense nor in
    the order of the images."""
    g = np.random.default_rng(seed)
    ids = g.permutation(10 * persons * 4)[: persons * 4] + 5
    person = {int(template): number // 4 for number, template in enumerate(ids)}
    template_N = np.repeat(ids, g.integers(1, 6, len(ids)))
    media_N = g.integers(0, 3, len(template_N)) + 3 * template_N % 7
    centre = g.standard_normal((persons, dim))
    of_N = np.array([person[int(template)] for template in template_N])
    x_ND = (centre[of_N] + noise * g.standard_normal((len(of_N), dim))) * g.uniform(0.5, 20, (len(of_N), 1))
    pairs_P2 = g.choice(ids, (pairs, 2))
    same_P = np.array([person[int(a)] == person[int(b)] for a, b in pairs_P2])
    first = ids[::4]
    return Case(
        x_ND,
        template_N,
        media_N,
        g.uniform(0.1, 1, len(template_N)),
        pairs_P2,
        same_P,
        [first[: persons // 2], first[persons // 2 :]],
        np.setdiff1d(ids, first),
        person,
    )


def write(case: Case, folder: Path, *, dtype: str = "float32") -> dict[str, Path]:
    """The files, by the name of their option."""
    rows = range(len(case.x_ND))
    lines = {
        "media": [f"{n}.jpg {case.template_N[n]} {case.media_N[n]}" for n in rows],
        "detector": [
            f"{n}.jpg {' '.join(str(n % 90 + p / 4) for p in range(10))} {case.score_N[n]:.17g}" for n in rows
        ],
        "pairs": [f"{a} {b} {int(s)}" for (a, b), s in zip(case.pairs_P2, case.same_P, strict=True)],
        "g1": [
            "TEMPLATE_ID,SUBJECT_ID,FILENAME",
            *(f"{t},{case.person[int(t)]},img/{t}.png" for t in case.galleries[0]),
        ],
        "g2": [
            "TEMPLATE_ID,SUBJECT_ID,FILENAME",
            *(f"{t},{case.person[int(t)]},img/{t}.png" for t in case.galleries[1]),
        ],
        "probes": [
            "TEMPLATE_ID,SUBJECT_ID,FILENAME",
            *(f"{t},{case.person[int(t)]},frames/{k}.png" for t in case.probes for k in range(2)),
        ],
    }
    paths = {}
    for name, text in lines.items():
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text("\n".join(text) + "\n", encoding="utf-8")
    paths["x"] = folder / "x.npy"
    np.save(paths["x"], case.x_ND.astype(dtype))
    return paths
