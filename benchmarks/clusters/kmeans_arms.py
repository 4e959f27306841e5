"""Ways to run the same iterations of spherical k-means on the same points from the same centres.

Legend: N points, K clusters, D embedding size, b points of a block.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.lloyd.lloyd import Lloyd
from clustering.nearest.choice import runs_kernel
from clustering.nearest.nearest import Nearest, nearest_
from clustering.service.rows import TensorRows

FAISS, OURS, EVERYTHING, FLASH = "faiss", "ours", "ours, nothing left out", "flash-kmeans"
_BLOCK = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one run."""

    wall: float
    cpu: float
    """Seconds of all threads of the process: another process on the same cores does not count."""
    centres_KD: Tensor
    compared: float | None = None
    """Mean over the iterations of the work of comparisons over that of all with all; None: not known."""


Run = Callable[[Tensor, Tensor, int], Outcome]
"""Points (N, D) and centres to start from (K, D), float32 unit rows on the device, and a number of iterations."""


def arms(group: dist.ProcessGroup, device: torch.device) -> tuple[dict[str, Run], dict[str, str]]:
    """Ways that can run here, by name, and why the others are left out."""
    found: dict[str, Run] = {
        OURS: lambda *problem: _ours(*problem, group=group),
        EVERYTHING: lambda *problem: _ours(*problem, group=group, bounds=False, projection=False),
        "torch": _plain,
    }
    left_out: dict[str, str] = {}
    if device.type == "cpu":
        found["ours, without codes"] = lambda *problem: _ours(*problem, group=group, codes=False)
    if device.type == "cuda":
        if importlib.util.find_spec("flash_kmeans") is None:
            left_out[FLASH] = "flash-kmeans is not installed"
        else:
            found[FLASH] = _flash
    if importlib.util.find_spec("faiss") is None:
        left_out |= dict.fromkeys((FAISS, "faiss super"), "faiss is not installed")
    elif device.type == "cpu":
        found[FAISS] = lambda *problem: _faiss(*problem, gpu=False, use_super=False)
        found["faiss super"] = lambda *problem: _faiss(*problem, gpu=False, use_super=True)
    else:
        left_out["faiss super"] = "it runs on CPUs"
        import faiss  # noqa: PLC0415

        if getattr(faiss, "get_num_gpus", lambda: 0)():
            found[FAISS] = lambda *problem: _faiss(*problem, gpu=True, use_super=False)
        else:
            left_out[FAISS] = "faiss was built without GPUs"
    return found, left_out


def _timed(work: Callable[[], Tensor], device: torch.device, compared: list[float] | None = None) -> Outcome:
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    centres_KD = work()
    wait()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    share = sum(compared) / len(compared) if compared else None
    return Outcome(wall=wall, cpu=cpu, centres_KD=centres_KD.to(device), compared=share)


def _ours(x_ND: Tensor, start_KD: Tensor, iterations: int, *, group: dist.ProcessGroup, **options: bool) -> Outcome:
    compared: list[float] = []

    def work() -> Tensor:
        lloyd = Lloyd(
            TensorRows(x_ND),
            centres_SD=start_KD,
            num_clusters=len(start_KD),
            group=group,
            product_dtype=torch.bfloat16 if x_ND.is_cuda else torch.float32,
            **options,  # type: ignore[arg-type]
        )
        compared.extend(lloyd.iterate().compared for _ in range(iterations))
        return lloyd.centres_SD

    return _timed(work, x_ND.device, compared)


def _plain(x_ND: Tensor, start_KD: Tensor, iterations: int) -> Outcome:
    """The loop that one writes in torch: a block's cosines, their maximum, sums by index_add."""

    def work() -> Tensor:
        centres_KD = start_KD
        for _ in range(iterations):
            sums_KD = torch.zeros_like(centres_KD)
            for x_bD in x_ND.split(_BLOCK[x_ND.device.type]):
                sums_KD.index_add_(0, (x_bD @ centres_KD.T).argmax(1), x_bD)
            length_K1 = sums_KD.norm(dim=1, keepdim=True)
            centres_KD = torch.where(length_K1 > 0, sums_KD / length_K1, centres_KD)
        return centres_KD

    return _timed(work, x_ND.device)


def _faiss(x_ND: Tensor, start_KD: Tensor, iterations: int, *, gpu: bool, use_super: bool) -> Outcome:
    """Its own settings but for those that would take fewer points or iterations.

    Raises RuntimeError when it ended early all the same.
    """
    import faiss  # noqa: PLC0415

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, start = x_ND.cpu().numpy(), start_KD.cpu().numpy().copy()
    options = {"use_super_kmeans": True} if use_super else {}
    kmeans = faiss.Kmeans(
        x.shape[1],
        len(start),
        niter=iterations,
        spherical=True,
        gpu=gpu,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
        **options,
    )
    if hasattr(kmeans.cp, "early_stop_threshold"):
        kmeans.cp.early_stop_threshold = -1.0  # an iteration that gains nothing is made all the same

    def work() -> Tensor:
        kmeans.train(x, init_centroids=start)
        return torch.from_numpy(kmeans.centroids)

    outcome = _timed(work, x_ND.device)
    made = 0 if kmeans.obj is None else len(kmeans.obj)
    if made != iterations:
        raise RuntimeError(f"faiss made {made} iterations, expected {iterations}")
    return outcome


def _flash(x_ND: Tensor, start_KD: Tensor, iterations: int) -> Outcome:
    """The package flash-kmeans on bfloat16 rows; its centres are bfloat16 as well."""
    from flash_kmeans.kmeans_triton_impl import batch_kmeans_Cosine  # noqa: PLC0415

    def work() -> Tensor:
        _, centres_1KD, made = batch_kmeans_Cosine(
            x_ND.bfloat16()[None], len(start_KD), max_iters=iterations, init_centroids=start_KD.bfloat16()[None]
        )
        if made != iterations:
            raise RuntimeError(f"flash-kmeans made {made} iterations, expected {iterations}")
        centres_KD: Tensor = centres_1KD[0].float()
        return centres_KD

    return _timed(work, x_ND.device)


def objective(x_ND: Tensor, centres_KD: Tensor) -> float:
    """Mean cosine of the points to the nearest of the centres, each dot product in float64."""
    centres_KD = F.normalize(centres_KD.double()).float()
    operand_KD = centres_KD.bfloat16() if x_ND.is_cuda else centres_KD  # they find candidates
    cluster_K = torch.arange(len(centres_KD), device=x_ND.device)
    kernels, total = runs_kernel("auto", centres_KD), 0.0
    for x_bD in x_ND.split(_BLOCK[x_ND.device.type]):
        state = Nearest.unknown(len(x_bD), x_ND.device)
        nearest_(state, x_bD, centres_KD, operand_KD, cluster_K, kernels=kernels)
        total += float(state.best_b.sum())
    return total / len(x_ND)


def face_like(points: int, people: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit rows around as many random directions: cosine 0.65 to their own; few people have most of the points.

    The j-th person's share is proportional to j^-1/2. float32 (N, D).
    """
    person_CD = F.normalize(torch.randn(people, dim, generator=generator))
    share_C = torch.arange(1, people + 1).double() ** -0.5
    person_N = torch.multinomial(share_C, points, replacement=True, generator=generator)
    x_ND = torch.randn(points, dim, generator=generator).mul_((0.65**-2 - 1) ** 0.5 / dim**0.5)
    return F.normalize(x_ND.add_(person_CD[person_N]))


def unstructured(points: int, people: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit rows in all directions alike, float32 (N, D)."""
    return F.normalize(torch.randn(points, dim, generator=generator))


DATA = {"faces": face_like, "random": unstructured}
