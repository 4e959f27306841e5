"""Does `python -m clustering kmeans` find the persons, as well as scikit-learn's and faiss's k-means do?

All ways get the same unit rows and as many clusters as there are persons; ours is run as its users run it. Each seed
starts at other samples. Data: rows around random directions (`--people`, `--points`, `--dim`), new ones for each seed,
or embeddings of a record set (`python -m evaluation embed`), whose labels are the truth.

Legend: N rows, D components, C persons, K clusters, Q pairs of a person and a cluster that share rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from benchmarks.measuring.report import digits, facts, publish
from clustering.job.files import unit_rows
from data.rec.records import RecordSet

Ints = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]
HEADER = ("data", "way", "BCubed F", "NMI", "pairwise F", "mean cosine", "seconds", "worst BCubed F")
_ONLY_IN_FILE = ("mean cosine", "worst BCubed F")
_TITLE = "Persons found by k-means"
_COSINE = 0.65
"""Of a row to its person's direction, in the made-up data: that of embeddings of faces in the wild."""


class Scores(NamedTuple):
    """How an assignment agrees with the truth; 1: they are the same."""

    bcubed: float
    """F of the means over rows of the share of a row's cluster that is its person, and of the person in the cluster."""
    nmi: float
    """Mutual information over the arithmetic mean of both entropies."""
    pairwise: float
    """F of precision and recall over pairs of rows."""


def scores(person_N: Ints, cluster_N: Ints) -> Scores:
    """Both int64 (N,), any numbers."""
    N = len(person_N)
    person_N, cluster_N = (np.unique(values, return_inverse=True)[1] for values in (person_N, cluster_N))
    pair_Q, count_Q = np.unique(person_N * (cluster_N.max() + 1) + cluster_N, return_counts=True)
    people_C, clusters_K = np.bincount(person_N), np.bincount(cluster_N)
    of_person_Q, of_cluster_Q = people_C[pair_Q // len(clusters_K)], clusters_K[pair_Q % len(clusters_K)]
    squares_Q = count_Q.astype(np.float64) ** 2
    precision, recall = (squares_Q / of_cluster_Q).sum() / N, (squares_Q / of_person_Q).sum() / N
    mutual = (count_Q / N * np.log(N * count_Q.astype(np.float64) / of_person_Q / of_cluster_Q)).sum()
    entropy = sum(-(count / N * np.log(count / N)).sum() for count in (people_C, clusters_K)) / 2
    together = (squares_Q - count_Q).sum()
    pairs = sum((count.astype(np.float64) * (count - 1)).sum() for count in (people_C, clusters_K))
    return Scores(
        bcubed=float(2 * precision * recall / (precision + recall)),
        nmi=float(mutual / entropy) if entropy else 1.0,
        pairwise=float(2 * together / pairs) if pairs else 1.0,
    )


class Found(NamedTuple):
    """What a way found, and how long it took."""

    cluster_N: Ints
    seconds: float


Way = Callable[[Matrix, int, int], Found]
"""Unit rows (N, D), K, seed."""


def ours(*options: str) -> Way:
    """The command in a process of its own, with one thread; seconds are the job's, without Python's start."""

    def way(x_ND: Matrix, clusters: int, seed: int) -> Found:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.save(folder / "x.npy", x_ND)
            out = folder / "centres.npy"
            command = [sys.executable, "-m", "clustering", "kmeans", str(folder / "x.npy"), "--k", str(clusters)]
            command += ["--out", str(out), "--seed", str(seed), "--device", "cpu", *options]
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1], env=one_core())
            told = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
            return Found(np.load(out.with_suffix(".assignments.npy")).astype(np.int64), told["seconds"])

    return way


def one_core() -> dict[str, str]:
    """The environment of a process that uses one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def scikit_learn(n_init: int) -> Way:
    """KMeans of unit rows: with k-means++ and as many starts."""
    from sklearn.cluster import KMeans  # noqa: PLC0415  only this way needs it

    def way(x_ND: Matrix, clusters: int, seed: int) -> Found:
        begin = time.perf_counter()
        found = KMeans(clusters, n_init=n_init, random_state=seed).fit(x_ND)
        return Found(found.labels_.astype(np.int64), time.perf_counter() - begin)

    return way


def faiss_spherical(nredo: int) -> Way:
    """faiss.Kmeans(spherical=True), its 25 iterations, on all rows."""
    import faiss  # noqa: PLC0415  only this way needs it

    faiss.omp_set_num_threads(1)

    def way(x_ND: Matrix, clusters: int, seed: int) -> Found:
        begin = time.perf_counter()
        most = len(x_ND)
        found = faiss.Kmeans(
            x_ND.shape[1], clusters, spherical=True, nredo=nredo, seed=seed + 1, min_points_per_centroid=1,
            max_points_per_centroid=most,
        )  # fmt: skip
        found.train(x_ND)
        _, cluster_N1 = found.index.search(x_ND, 1)
        return Found(cluster_N1[:, 0].astype(np.int64), time.perf_counter() - begin)

    return way


def ways(restarts: int) -> dict[str, Way]:
    """By name; the first is the default of the command. restarts: of the rivals, more than one where they offer it."""
    return {
        "ours": ours(),
        "ours, kmeans++": ours("--seeding", "kmeans++"),
        "scikit-learn": scikit_learn(1),
        f"scikit-learn, best of {restarts}": scikit_learn(restarts),
        "faiss": faiss_spherical(1),
        f"faiss, best of {restarts}": faiss_spherical(restarts),
    }


def mixture(points: int, people: int, dim: int, seed: int) -> tuple[Matrix, Ints]:
    """Unit rows around random directions and whose they are; the j-th person's share is proportional to j^-1/2."""
    generator = torch.Generator().manual_seed(seed)
    person_CD = F.normalize(torch.randn(people, dim, generator=generator))
    share_C = torch.arange(1, people + 1).double() ** -0.5
    drawn_N = torch.multinomial(share_C, points - people, replacement=True, generator=generator)
    person_N = torch.cat([torch.arange(people), drawn_N])
    noise_ND = torch.randn(points, dim, generator=generator) * ((_COSINE**-2 - 1) / dim) ** 0.5
    return F.normalize(person_CD[person_N] + noise_ND).numpy(), person_N.numpy()


def mean_cosine(x_ND: Matrix, cluster_N: Ints) -> float:
    """Of the rows to the unit means of their clusters, float64."""
    sums_KD = np.zeros((cluster_N.max() + 1, x_ND.shape[1]))
    np.add.at(sums_KD, cluster_N, x_ND)
    return float(np.linalg.norm(sums_KD, axis=1).sum() / len(x_ND))


def measure(data: str, problem: Callable[[int], tuple[Matrix, Ints]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each way, with those of every seed."""
    rows: list[dict[str, Any]] = []
    for name, way in ways(args.restarts).items():
        runs = []
        for seed in range(args.seeds):
            x_ND, person_N = problem(seed)
            found = way(x_ND, len(np.unique(person_N)), seed)
            run = {**scores(person_N, found.cluster_N)._asdict(), "mean_cosine": mean_cosine(x_ND, found.cluster_N)}
            runs.append({**run, "seconds": found.seconds})
        rows.append({"data": data, "way": name, "runs": runs})
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The texts of a row, as HEADER names them: means over seeds."""
    mean = {key: statistics.fmean(run[key] for run in row["runs"]) for key in row["runs"][0]}
    quality = (f"{mean[key]:.4f}" for key in ("bcubed", "nmi", "pairwise", "mean_cosine"))
    worst = min(run["bcubed"] for run in row["runs"])
    return (row["data"], row["way"], *quality, digits(mean["seconds"]), f"{worst:.4f}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster_quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--people", type=int, default=1000, help="of the made-up data, default 1000")
    parser.add_argument("--points", type=int, default=15000, help="default 15000")
    parser.add_argument("--dim", type=int, default=128, help="default 128")
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help="also these, a .npy (N, D) of the record set")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="the record set of --embeddings")
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    parser.add_argument("--restarts", type=int, default=3, help="of the rivals' longer runs, default 3")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result in Markdown, and beside it .json")
    args = parser.parse_args(arguments)
    if min(args.people, args.dim - 1, args.seeds, args.restarts - 1, args.points - args.people) < 1:
        parser.error("expected --people and --seeds of at least 1, --dim and --restarts of 2, --points above --people")
    if (args.embeddings is None) != (args.records is None):
        parser.error("expected --embeddings and --records together")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = _parse(arguments)
    torch.set_num_threads(1)
    about = facts(torch.device("cpu"), "benchmarks.cluster_quality", arguments)
    about["scores"] = f"means over {args.seeds} seeds; 1 is the truth itself; every way has one thread"
    about["rivals"] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("scikit-learn", "faiss-cpu"))
    about["mixture"] = (
        f"{args.points:,} rows of {args.people:,} persons, D {args.dim}, cosine {_COSINE} to their person"
    )
    rows = measure("mixture", lambda seed: mixture(args.points, args.people, args.dim, seed), args)
    if args.embeddings is not None:
        x_ND = unit_rows(torch.from_numpy(np.load(args.embeddings, allow_pickle=False)).float()).numpy()
        person_N = np.asarray(RecordSet.open(args.records).labels, dtype=np.int64)
        about["embeddings"] = f"{len(x_ND):,} rows of {len(np.unique(person_N)):,} persons, D {x_ND.shape[1]}"
        rows += measure("embeddings", lambda seed: (x_ND, person_N), args)
    publish(
        _TITLE, HEADER, [cells(row) for row in rows], about=about, rows=rows, out=args.out, only_in_file=_ONLY_IN_FILE
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
