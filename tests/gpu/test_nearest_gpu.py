"""The nearest centres on a GPU, by the kernel and by torch, against float64 truth; whole iterations as on a CPU."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.lloyd.lloyd import Lloyd
from clustering.nearest import kernel_nearest
from clustering.service.rows import TensorRows
from tests import nearest_cases
from tests.dist.test_lloyd import CASES as LLOYD_CASES
from tests.dist.test_lloyd import data
from tests.nearest_cases import BF16, CASES, FP32, Case, unit
from tests.ranks import RankPool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("case", [*CASES, Case(4099, 10007, 512, BF16)], ids=str)
def test_the_two_largest_cosines(case: Case, kernel: bool) -> None:
    nearest_cases.check_top_two(case, "cuda", kernel)


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        Case(1, 1, 8, BF16),
        Case(129, 257, 120, BF16),
        Case(300, 5000, 512, BF16),
        Case(517, 70001, 248, BF16),
        Case(4099, 10007, 512, BF16),
        Case(100, 3000, 640, BF16),
    ],
    ids=str,
)
def test_who_may_be_nearest(case: Case) -> None:
    nearest_cases.check_candidates(case, "cuda")


@needs_hopper
@pytest.mark.parametrize("dim", [8, 120, 512])
def test_the_kernel_for_hopper_runs(dim: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_nearest._hopper(torch.device("cuda", 0), BF16, dim) is not None


def test_two_runs_have_the_same_bits() -> None:
    x_bD, centres_sD = unit(5000, 512, seed=1).cuda(), unit(9000, 512, seed=2).cuda().to(BF16)
    hidden_b = torch.arange(5000, device="cuda")
    runs = [kernel_nearest.candidates(x_bD, centres_sD, hidden_b) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("D", [60, 64])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kernel", [False, True])
def test_ties_go_to_the_smaller_cluster_in_any_order_of_tiles(kernel: bool, dtype: torch.dtype, D: int) -> None:
    nearest_cases.check_ties("cuda", kernel, dtype, D)


@pytest.mark.parametrize("D", [60, 64])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kernel", [False, True])
def test_data_that_has_collapsed_is_told_apart_exactly(kernel: bool, dtype: torch.dtype, D: int) -> None:
    nearest_cases.check_collapsed("cuda", kernel, dtype, D)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_iterations_lead_where_they_do_on_a_cpu(ranks: RankPool, dtype: torch.dtype) -> None:
    (on_cpu,), (on_gpu,) = (ranks.run(1, _iterations, device, dtype) for device in ("cpu", "cuda"))
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(one[0], other[0])
        torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-6)


def _iterations(group: dist.ProcessGroup, device: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    x_ND, start_KD = data(LLOYD_CASES["fewer seeds than groups"])
    lloyd = Lloyd(
        TensorRows(x_ND.to(device)),
        centres_SD=start_KD.to(device),
        num_clusters=len(start_KD),
        group=group,
        product_dtype=dtype,
        block=100,
    )
    found = []
    for _ in range(6):
        lloyd.iterate()
        found.append((lloyd.index_P.cpu(), lloyd.centres_SD.cpu()))
    return found
