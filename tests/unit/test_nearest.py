"""The nearest centres: in torch, by the kernel under Triton's interpreter, and by projections."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clustering.nearest import by_projection as nearest_projection
from clustering.nearest import nearest
from clustering.nearest.by_pairs import quieten
from clustering.nearest.by_projection import Projection, Sample, choose, find_, random_basis, subspaces
from clustering.nearest.choice import runs_kernel, why_not
from clustering.nearest.nearest import Nearest, columns_of
from clustering.nearest.projected import CodedProjections, PlainProjections, project_points
from partial_fc.choice import KernelFallbackWarning, say_once
from tests import nearest_cases
from tests.nearest_cases import BF16, CASES, FP32, Case, unit
from tests.triton_process import Run, needs_triton


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_two_largest_cosines(case: Case) -> None:
    nearest_cases.check_top_two(case, "cpu", kernel=False)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_ties_go_to_the_smaller_cluster_in_any_order_of_tiles(dtype: torch.dtype) -> None:
    nearest_cases.check_ties("cpu", False, dtype)


def test_data_that_has_collapsed_is_told_apart_exactly() -> None:
    nearest_cases.check_collapsed("cpu", False)


@pytest.mark.parametrize("all_at_once", [False, True], ids=["as on CPUs", "as on GPUs"])
@pytest.mark.parametrize("offered", [2, 8])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_several_candidates_a_point_lead_to_the_same_decisions(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, offered: int, all_at_once: bool
) -> None:
    """offered: those that are compared one by one, fewer than there are candidates."""
    monkeypatch.setattr(nearest, "_candidates", nearest_cases.four_of_each_part)
    monkeypatch.setattr(nearest, "_OFFERED", offered)
    if all_at_once:
        monkeypatch.setattr(nearest, "offer_some_", nearest.offer_all_)
    nearest_cases.check_ties("cpu", False, dtype)
    nearest_cases.check_collapsed("cpu", False, dtype)


def test_what_is_known_does_not_depend_on_how_it_is_offered() -> None:
    generator = torch.Generator().manual_seed(0)
    b, L = 200, 5
    states = [Nearest.unknown(b, torch.device("cpu")) for _ in range(2)]
    for turn in range(3):
        cluster_bL = torch.stack([torch.randperm(40, generator=generator)[:L] for _ in range(b)]) + 40 * (2 - turn)
        cosine_bL = torch.randint(0, 6, (b, L), generator=generator).double() / 8  # many ties
        offered_bL = torch.rand(b, L, generator=generator) < 0.6
        row_q, place_q = offered_bL.nonzero(as_tuple=True)
        states[0].offer_pairs_(row_q, cluster_bL[row_q, place_q], cosine_bL[row_q, place_q])
        states[1].offer_each_(cluster_bL, cosine_bL.masked_fill(~offered_bL, float("-inf")))
        for name in ("best_b", "index_b", "second_b"):
            assert torch.equal(getattr(states[0], name), getattr(states[1], name)), (turn, name)
    assert (states[0].index_b >= 0).all()


@needs_triton
def test_the_trial_of_a_kernel_names_what_is_wrong(interpreter: Run) -> None:
    assert interpreter(_tried, "right") == ""
    for wrong in ("column", "rest", "first"):
        assert "are off by" in interpreter(_tried, wrong)


def _tried(what: str) -> str:
    from clustering.nearest.kernel_nearest import _tried as tried

    def winners(x_bD: Tensor, operand_sD: Tensor, hidden_b: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
        cosine_bL, column_bL, rest_b = nearest_cases.four_of_each_part(x_bD, operand_sD, hidden_b)
        if what == "column":
            column_bL[5, 3] = column_bL[5, 2]
        elif what == "rest":
            rest_b[7] -= 0.01
        elif what == "first":
            cosine_bL, column_bL = cosine_bL[:, 1:], column_bL[:, 1:]
        return cosine_bL, column_bL, rest_b

    return tried(winners, torch.device("cpu"), 32)


@needs_triton
@pytest.mark.parametrize("case", [case for case in CASES if case.centres < 1000], ids=str)
def test_kernel_finds_the_two_largest_cosines(interpreter: Run, case: Case) -> None:
    interpreter(nearest_cases.check_top_two, case, "cpu", True)


@needs_triton
@pytest.mark.parametrize("case", [case for case in CASES if case.centres < 1000], ids=str)
def test_kernel_says_who_may_be_nearest(interpreter: Run, case: Case) -> None:
    interpreter(nearest_cases.check_candidates, case, "cpu")


@needs_triton
def test_kernel_leads_to_the_same_decisions(interpreter: Run) -> None:
    interpreter(nearest_cases.check_ties, "cpu", True, FP32)


def _compile(capability: int) -> int:
    """Compile for that GPU, here or not; the largest shared memory of the last launch of each list, in bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from clustering.nearest.kernel_nearest import _LAUNCHES, _top_two_kernel

    kernel: Any = _top_two_kernel
    names, least = kernel.arg_names, 0
    for dtype, launches in _LAUNCHES.items():
        operand = "*bf16" if dtype == BF16 else "*fp32"
        types = dict.fromkeys(("x", "centres"), operand) | dict.fromkeys(("first", "second"), "*fp32")
        types |= dict.fromkeys(("hidden", "column"), "*i64") | dict.fromkeys(("B", "S", "split_size"), "i32")
        for launch in {launches[0], launches[-1]} if dtype == BF16 else launches[-1:]:
            constants = {"D": 507, "BLOCK_N": launch.points, "BLOCK_C": launch.centres, "BLOCK_K": launch.columns}
            signature = {name: "constexpr" if name in constants else types[name] for name in names}
            source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
            options = {"num_warps": launch.warps, "num_stages": launch.stages}
            done = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
            if launch == launches[-1]:
                least = max(least, int(done.metadata.shared))
    return least


@needs_triton
def test_kernel_compiles(compiler: Run) -> None:
    assert compiler(_compile, 80) <= 100 * 1024


def _compile_for_hopper(dim: int) -> tuple[int, str]:
    """Bytes of shared memory and the machine's text of the kernel for Hopper GPUs, compiled here or anywhere."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as compile_kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    from clustering.nearest import kernel_nearest_hopper as hopper

    kernel: Any = hopper._winners_kernel
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
    constants = {
        "STEPS": -(-dim // 64),
        "ROWS": 64,
        "TILE": 256,
        "COLUMNS": 64,
        "STAGES": hopper.stages_of(dim, 232448),
    }
    types = {"x_tiles": f"tensordesc<bf16[64,64],{layout}>", "centre_tiles": f"tensordesc<bf16[256,64],{layout}>"}
    types |= {"hidden": "*i64", "column": "*i32"} | dict.fromkeys(("cosine", "rest"), "*fp32")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = GluonASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 4, "maxnreg": hopper._REGISTERS}
    done = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    return int(done.metadata.shared), str(done.asm["ptx"])


@needs_triton
@pytest.mark.parametrize("dim", [120, 512])
def test_kernel_for_hopper_compiles(compiler: Run, dim: int) -> None:
    shared, text = compiler(_compile_for_hopper, dim)
    assert shared <= 232448
    assert text.count("wgmma.mma_async.sync.aligned.m64n256k16") == 2 * 4 * -(-dim // 64)
    assert "cp.async.bulk.tensor" in text


def test_centres_are_split_so_that_few_cores_are_idle() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from clustering.nearest.kernel_nearest_hopper import splits_of, stages_of

    assert splits_of(512, 1408, 132) == 1
    assert splits_of(132, 1408, 132) == 1
    assert splits_of(1, 1408, 132) > 16
    assert splits_of(1, 3, 132) == 3
    blocks, P = 79, splits_of(79, 1408, 132)
    assert blocks * P / (132 * -(-blocks * P // 132)) > 0.95
    assert [stages_of(dim, 232448) for dim in (8, 512, 576)] == [6, 3, 2]


def test_the_kernel_runs_where_it_is_asked_for_and_can() -> None:
    centres_SD = torch.ones(2, 8)
    assert not runs_kernel("auto", centres_SD)
    assert not runs_kernel("torch", centres_SD)
    assert why_not(centres_SD)
    say_once.cache_clear()
    with pytest.warns(KernelFallbackWarning, match="torch runs instead"):
        assert not runs_kernel("triton", centres_SD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runs_kernel("triton", centres_SD)


def test_places_of_clusters_in_a_tile() -> None:
    cluster_s = torch.tensor([2, 5, 9])
    assert columns_of(torch.tensor([-1, 0, 2, 5, 6, 9, 10]), cluster_s).tolist() == [-1, -1, 0, 1, -1, 2, -1]


def _pair(cosine: float, D: int, count: int) -> tuple[Tensor, Tensor]:
    """Pairs of unit rows of that cosine."""
    x_qD, other_qD = unit(count, D, seed=6), unit(count, D, seed=7)
    other_qD = F.normalize(other_qD - (other_qD * x_qD).sum(1, keepdim=True) * x_qD)
    return x_qD, cosine * x_qD + (1 - cosine**2) ** 0.5 * other_qD


@pytest.mark.parametrize("cosine", [0.2, 0.6])
def test_limits_are_as_many_deviations_off_as_they_say(cosine: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2 deviations 2.3% of the pairs are missed, at 5 none of 20 000."""
    x_qD, centre_qD = _pair(cosine, 128, 20000)
    head_qd, head_centre_qd = (rows @ random_basis(128)[:, :48] for rows in (x_qD, centre_qD))
    projection = Projection(dims=48, cosine=cosine, dim=128)
    product_q, kept_q = (head_qd * head_centre_qd).sum(1), head_qd.square().sum(1)
    assert (product_q > projection.limits(kept_q)).all()
    monkeypatch.setattr(nearest_projection, "_DEVIATIONS", 2.0)
    missed = float((product_q < projection.limits(kept_q)).double().mean())
    assert 0.018 < missed < 0.028


def _clustered(points: int, K: int, D: int, spread: float) -> tuple[Tensor, Tensor]:
    centres_KD = unit(K, D, seed=8)
    noise_ND = torch.randn(points, D, generator=torch.Generator().manual_seed(9)) * spread / D**0.5
    return F.normalize(centres_KD[torch.arange(points) % K] + noise_ND), centres_KD


@pytest.mark.parametrize(("dims", "codes"), [(128, False), (128, True), (136, True)])
def test_projection_finds_every_centre_above_its_cosine(dims: int, codes: bool) -> None:
    x_ND, centres_KD = _clustered(700, 300, 256, 1.2)
    x_ND[5], x_ND[6] = centres_KD[7], F.normalize(centres_KD[7:8] + centres_KD[8:9])[0]
    basis_DE = torch.linalg.qr(unit(256, 256, seed=12)).Q
    projection = Projection(dims=dims, cosine=0.45, dim=256)
    points_N, head_Kd = project_points(x_ND @ basis_DE[:, :dims], codes=codes), centres_KD @ basis_DE[:, :dims]
    projected_K = CodedProjections(head_Kd) if codes else PlainProjections(head_Kd)
    state = Nearest.unknown(700, torch.device("cpu"))
    state.index_b[5], state.best_b[5] = 7, 1.0  # its own, not compared again
    cluster_K = torch.arange(300) * 2
    cluster_K[7] = 7
    cluster_K = cluster_K.sort().values
    quieten()
    pairs = find_(state, x_ND, points_N, centres_KD, projected_K, cluster_K, projection)
    true_NK = x_ND.double() @ centres_KD.double().T
    best_N, column_N = true_NK.max(1)
    solved_N = best_N >= 0.45
    solved_N[5] = False
    assert solved_N.double().mean() > 0.9
    assert 700 <= pairs < 0.1 * true_NK.numel()
    torch.testing.assert_close(state.best_b[solved_N], best_N[solved_N], rtol=0, atol=1e-12)
    assert torch.equal(state.index_b[solved_N], cluster_K[column_N[solved_N]])
    second_N = true_NK.topk(2).values[:, 1]
    assert ((state.second_b >= second_N - 1e-6) | (second_N < 0.45))[solved_N].all()


def test_a_projection_is_chosen_where_it_pays() -> None:
    x_ND, centres_KD = _clustered(4096, 512, 256, 1.0)
    basis_DE = random_basis(256)
    for rows_QD, pays in ((x_ND[::16], True), (unit(256, 256, seed=10), False)):
        tables = []
        for part_QD in rows_QD.split(100):  # counts of parts add up to those of the whole
            sample = Sample(part_QD, basis_DE)
            sample.see(centres_KD[:300])
            sample.see(centres_KD[300:])
            tables.append(sample.table())
        for codes in (False, True):
            found = choose(torch.stack(tables).sum(0), 256, 512, known=True, codes=codes)
            assert (found is not None) == pays
    assert subspaces(32) == []
    assert random_basis(32).shape == (32, 0)


def test_basis_is_orthonormal_and_the_same_every_time() -> None:
    basis_DE = random_basis(123)
    torch.testing.assert_close(basis_DE.T @ basis_DE, torch.eye(basis_DE.shape[1]), rtol=0, atol=1e-5)
    assert torch.equal(basis_DE, random_basis(123))
