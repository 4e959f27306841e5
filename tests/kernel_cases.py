"""Checks of the kernels against float64 truth, for any device: under Triton's interpreter on CPUs, and on GPUs.

Legend: as in `kernel_problems`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from partial_fc import kernels
from partial_fc.rounding import lots, more_lots, stochastic_bf16
from tests.kernel_problems import BF16, FP32, Case, problem, true_forward, true_gradient, true_step

Check = Callable[[str], None]


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, of the whole tensor."""
    truth = truth.double().cpu()
    return float((found.double().cpu() - truth).norm() / truth.norm().clamp_min(1e-300))


def hold(found: Tensor, truth: Tensor, tolerance: float) -> None:
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    measured = error(found, truth)
    assert measured <= tolerance, f"relative error {measured:.2e}, expected at most {tolerance:.0e}"


def _tolerance(case: Case) -> float:
    return 2e-6 if case.product_dtype == FP32 else 1e-2


def check_forward(case: Case, device: str) -> None:
    terms = problem(case, device).terms
    other_N, u_ND = kernels.forward(terms, want_u=True)
    true_other_N, true_u_ND = true_forward(terms)
    hold(other_N, true_other_N, _tolerance(case))
    assert u_ND is not None
    hold(u_ND, true_u_ND, _tolerance(case))
    alone_N, nothing = kernels.forward(terms, want_u=False)
    assert nothing is None
    hold(alone_N, true_other_N, _tolerance(case))


def check_gradient(case: Case, device: str) -> None:
    batch = problem(case, device).batch
    grad_SD = kernels.gradient([batch], batch.terms.rows_S)
    truth_CD = true_gradient(batch)
    if batch.terms.rows_S is None:
        hold(grad_SD, truth_CD, _tolerance(case))
        return
    real = int((batch.terms.rows_S < case.C).sum())
    hold(grad_SD[:real], truth_CD[batch.terms.rows_S[:real].cpu()], _tolerance(case))
    assert not grad_SD[real:].any(), "padding has a gradient"


def check_two_batches(device: str) -> None:
    """Batches that share some classes: each has padding where a class is the other's alone."""
    case = Case(20, 12, 50)
    first, other = (problem(dataclasses.replace(case, seed=seed), device).batch for seed in (1, 2))
    rows_S = torch.arange(0, 45, device=device)
    batches = []
    for batch, absent in ((first, rows_S % 3 == 0), (other, rows_S % 3 == 1)):
        mine_S = torch.where(absent, case.C, rows_S)
        gone_N = torch.isin(batch.terms.target_N, rows_S[absent]) | (batch.terms.target_N >= 45)
        target_N = torch.where(gone_N, -1, batch.terms.target_N)
        terms = dataclasses.replace(batch.terms, w_CD=first.terms.w_CD, rows_S=mine_S, target_N=target_N)
        batches.append(dataclasses.replace(batch, terms=terms))
    truth_CD = true_gradient(batches[0]) + true_gradient(batches[1])
    hold(kernels.gradient(batches, rows_S), truth_CD[:45], 2e-6)


def _states(case: Case, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Momentum, mean square and steps of a run that has been going on, unevenly."""
    first_CD = 0.1 * torch.randn(case.C, case.D, generator=generator)
    second_CD = 0.01 * torch.rand(case.C, case.D, generator=generator)
    steps_C1 = torch.randint(0, 3, (case.C, 1), generator=generator) * 600.0
    return first_CD.to(device, case.weight_dtype), second_CD.to(device, case.weight_dtype), steps_C1.to(device)


def _make_rule(kind: str, on_sphere: bool, states: tuple[Tensor, Tensor, Tensor]) -> Any:
    if kind == "sgd":
        return kernels.Sgd(velocity_CD=states[0], lr=0.3, momentum=0.9, decay=0.01, on_sphere=on_sphere)
    return kernels.AdamW(
        mean_CD=states[0],
        square_CD=states[1],
        row_steps_C1=states[2],
        lr=0.02,
        betas=(0.9, 0.999),
        eps=1e-8,
        decay=0.1,
        on_sphere=on_sphere,
    )


def check_update(case: Case, device: str, kind: str, on_sphere: bool) -> None:
    """Rows that take part: the step, to float32's or bf16's rounding. The others: not a bit."""
    made = problem(case, device)
    w_CD, rows_S = made.terms.w_CD, made.terms.rows_S
    rule = _make_rule(kind, on_sphere, _states(case, made.generator, device))
    names = [field.name for field in dataclasses.fields(rule) if isinstance(getattr(rule, field.name), Tensor)]
    tensors = {"w_CD": w_CD} | {name: getattr(rule, name) for name in names}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    truth = true_step(rule, w_CD, true_gradient(made.batch))
    kernels.update([made.batch], rows_S, rule, key=0xDEADBEEF, first_row=1000)
    moved_C = torch.ones(case.C, dtype=torch.bool)
    if rows_S is not None:
        moved_C = torch.isin(torch.arange(case.C), rows_S.cpu())
    for name, tensor in tensors.items():
        still = tensor.cpu()[~moved_C].equal(before[name].cpu()[~moved_C])
        assert still, f"{name}: a row that took no part has changed"
        found, expected = tensor.cpu()[moved_C], truth[name][moved_C]
        if tensor.dtype == FP32:
            hold(found, expected, 2e-6 if case.product_dtype == FP32 else 1e-2)
        else:
            off = (found.double() - expected).abs() / expected.abs().clamp_min(1e-3)
            assert off.max() <= 1.01 * 2**-7, f"{name}: {off.max():.3e} is more than a step of bf16"


def check_skip(case: Case, device: str, kind: str, on_sphere: bool) -> None:
    """A flag that is set: not a bit changes, whatever the gradient is. One that is clear: as without it."""
    made = problem(case, device)
    w_CD, rows_S = made.terms.w_CD, made.terms.rows_S
    states = _states(case, made.generator, device)
    start = [tensor.clone() for tensor in (w_CD, *states)]
    ends = []
    for flag, by_N in ((1.0, torch.full_like(made.batch.by_N, torch.nan)), (0.0, None), (None, None)):
        for tensor, before in zip((w_CD, *states), start, strict=True):
            tensor.copy_(before)
        batch = made.batch if by_N is None else dataclasses.replace(made.batch, by_N=by_N)
        skip = None if flag is None else torch.tensor(flag, device=device)
        kernels.update([batch], rows_S, _make_rule(kind, on_sphere, states), key=7, skip=skip)
        ends.append([tensor.clone() for tensor in (w_CD, *states)])
    for before, skipped, clear, without in zip(start, *ends, strict=True):
        assert torch.equal(before, skipped)
        assert torch.equal(clear, without)
    assert not torch.equal(ends[1][0], start[0])


def check_lots(device: str) -> None:
    """Without a gradient, and with short factors, float32 is exact: bf16 must have the bits of the plain version."""
    case = Case(7, 50, 40, weight_dtype=BF16)
    made = problem(case, device)
    w_CD, none_N = made.terms.w_CD, torch.zeros(case.N, device=device)
    batch = dataclasses.replace(made.batch, by_N=none_N, at_target_N=none_N)
    mean_CD, square_CD, steps_C1 = _states(case, made.generator, device)
    mean_CD[3, 5] = torch.nan
    w, m, q = (t.float().cpu() for t in (w_CD, mean_CD, square_CD))
    row_C, key = torch.arange(case.C) + (1 << 31) - 50, 0x9ABCDEF0
    lots_CD = lots(row_C, case.D, key)

    velocity_CD = mean_CD.clone()
    sgd = kernels.Sgd(velocity_CD=velocity_CD, lr=0.25, momentum=0.5, decay=0.25)
    kernels.update([batch], None, sgd, key=key, first_row=(1 << 31) - 50)
    v = 0.5 * m + 0.25 * w
    _same(velocity_CD, stochastic_bf16(v, lots_CD >> 16))
    _same(w_CD, stochastic_bf16(w - 0.25 * v, lots_CD))

    adamw = kernels.AdamW(
        mean_CD=mean_CD, square_CD=square_CD, row_steps_C1=steps_C1, lr=0.5, betas=(0.75, 0.625), eps=1e-8
    )
    w_CD.copy_(w)  # the nan has spread over its row
    kernels.update([batch], None, adamw, key=key, first_row=(1 << 31) - 50)
    _same(mean_CD, stochastic_bf16(0.75 * m, lots_CD >> 16))
    _same(square_CD, stochastic_bf16(0.625 * q, more_lots(lots_CD)))


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def check_chunks(device: str) -> None:
    """Classes in several chunks, the last one short, as many of them are."""
    from partial_fc import kernel_parts

    case = Case(20, 16, 300, True, "hard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_parts, "_CHUNK_BYTES", 128 * case.D * 4)
        check_forward(case, device)
        check_gradient(case, device)
        check_update(case, device, "adamw", False)
        check_forward(dataclasses.replace(case, sampled=False), device)
        check_gradient(dataclasses.replace(case, sampled=False), device)


def check_tuning(device: str) -> None:
    """The fastest launch that fits, timed once for all batches of about a size."""
    from triton.runtime.errors import OutOfResources

    from partial_fc import kernel_tuning
    from partial_fc.kernel_tuning import Launch, fastest, launches

    terms = problem(Case(33, 252, 50, product_dtype=BF16), device).terms
    tried: list[Launch] = []

    def trial(launch: Launch) -> int:
        tried.append(launch)
        if len(tried) == 1:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return len(tried) % 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_tuning, "timed", lambda work, _: work())
        chosen = fastest("test", terms, lambda: trial)
        assert tried == list(launches(256, BF16))
        assert chosen == tried[2]
        longer = dataclasses.replace(terms, x_ND=torch.cat([terms.x_ND] * 2)[:63])
        assert fastest("test", longer, lambda: trial) == chosen
        assert len(tried) == len(launches(256, BF16))
        fewer = dataclasses.replace(terms, w_CD=terms.w_CD[:40])
        fastest("test", fewer, lambda: trial)
        assert len(tried) == 2 * len(launches(256, BF16)), "fewer centres: a trial of their own"
        tried.clear()
        with pytest.raises(RuntimeError, match="no block size"):
            fastest("none", terms, lambda: lambda launch: _raise(OutOfResources(300_000, 232_448, "registers")))


def check_timing() -> None:
    """On a pretended GPU: all runs of a turn are launched while the stream is held up, and the best turn counts."""
    from partial_fc.kernel_tuning import timed

    said: list[str] = []
    turns = iter([8.0, 4.0, 12.0, 6.0, 10.0])

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, _: Event) -> float:
            return next(turns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
        patch.setattr(torch.cuda, "_sleep", lambda _: said.append("hold"), raising=False)
        assert timed(lambda: said.append("run"), torch.device("cpu")) == 1.0
    assert said == ["run", *(["wait", "hold", "event", *["run"] * 4, "event", "wait"] * 5)]


def _raise(error: Exception) -> None:
    raise error


def check_empty(device: str) -> None:
    """No class in the shard, none drawn, no row in the batch."""
    terms = problem(Case(3, 12, 5), device).terms
    for rows_S, w_CD in ((None, terms.w_CD[:0]), (torch.zeros(0, dtype=torch.int64, device=device), terms.w_CD)):
        empty = dataclasses.replace(terms, w_CD=w_CD, rows_S=rows_S, target_N=torch.full_like(terms.target_N, -1))
        other_N, u_ND = kernels.forward(empty, want_u=True)
        assert other_N.tolist() == [0, 0, 0]
        assert u_ND is not None
        assert u_ND.shape == (3, 12)
        assert not u_ND.any()
        none_N = torch.zeros(3, device=device)
        batch = kernels.CosineGradient(terms=empty, by_N=none_N, at_target_N=none_N)
        assert kernels.gradient([batch], rows_S).shape == (0, 12)
    no_rows = dataclasses.replace(terms, x_ND=terms.x_ND[:0], target_N=terms.target_N[:0])
    other_N, _ = kernels.forward(no_rows, want_u=False)
    assert other_N.shape == (0,)
    none_N = torch.zeros(0, device=device)
    batch = kernels.CosineGradient(terms=no_rows, by_N=none_N, at_target_N=none_N)
    assert not kernels.gradient([batch], None).any()
