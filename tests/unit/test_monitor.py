"""Who is named when ranks lose each other, rank by rank; whole runs are in tests/integration/test_faults.py."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from backbones import build_backbone
from training.ranks import heartbeat, monitor
from training.ranks.heartbeat import Heartbeat
from training.ranks.lost import Heard, LostRankError, Word, first_line, says_a_rank_is_lost, whom_to_blame
from training.ranks.monitor import RECORDS, Monitor
from training.ranks.operation import operation_of_error, operation_of_thread

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:18642"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(monitor, "_EVIDENCE_S", 0.6)
    monkeypatch.setattr(monitor, "_TICK_S", 0.05)
    monkeypatch.setattr(monitor, "_GLOO_EARLIER_S", 0.1)
    monkeypatch.setattr(monitor, "START_S", 0.0)
    monkeypatch.setattr("training.ranks.lost.SILENT_S", 0.5)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Read error [10.0.0.1]:5: Connection reset by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistNetworkError("recv, got 0 bytes"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistBackendError("NCCL error: invalid usage"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError(GLOO), False),
        (ConnectionResetError("Connection reset by peer"), False),
    ],
)
def test_only_lost_ranks_are_told_in_a_line(error: BaseException, lost: bool) -> None:
    """Bugs of ours keep their traceback, also those that gloo finds."""
    assert says_a_rank_is_lost(error) is lost


def test_first_line_leaves_out_what_is_not_ours() -> None:
    assert first_line(RuntimeError(GLOO)) == "RuntimeError: Connection closed by peer [127.0.0.1]:18642"
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("a\nb")) == "ValueError: a"


def _word(**changes: Any) -> Word:
    usual = {"host": "b", "pid": 7, "step": 5, "phase": "training", "moves": 20, "idle": 0.0, "operation": "",
             "ended": "", "bereft": False}  # fmt: skip
    return Word(**(usual | changes))


@pytest.mark.parametrize(
    ("others", "unreachable", "expected"),
    [
        ({1: Heard(_word(), 9.0), 2: Heard(_word(), 0.2)}, "",
         "rank 1 (b, pid 7) has not been heard of for 9 s, last at step 5, training"),
        ({1: None, 2: Heard(_word(), 0.2)}, "", "rank 1 has never been heard of"),
        ({1: Heard(_word(ended="ValueError: x"), 9.0), 2: Heard(_word(), 9.0)}, "",
         "rank 1 (b, pid 7) ended at step 5, training (ValueError: x)"),
        # One that lost others as well is not the one to blame, nor is one that has done all it had to.
        ({1: Heard(_word(ended="lost", bereft=True), 3.0), 2: Heard(_word(pid=8), 3.0),
          3: Heard(_word(ended="done"), 9.0)}, "",
         "rank 2 (b, pid 8) has not been heard of for 3 s, last at step 5, training"),
        ({1: Heard(_word(ended="lost", bereft=True), 3.0)}, "", "rank 1 (b, pid 7) ended at step 5, training (lost)"),
        ({1: Heard(_word(), 9.0)}, "a:1", "rank 0 cannot reach the store at a:1: the network, or rank 0's host"),
        ({1: Heard(_word(moves=19, phase="data", idle=70.0, operation="read in read (data/x.py:1)"), 0.2),
          2: Heard(_word(), 0.2)}, "",
         "rank 1 (b, pid 7) is alive, for 70 s at step 5, data, read in read (data/x.py:1)"),
        ({1: Heard(_word(operation="elsewhere"), 0.2), 2: Heard(_word(operation="here"), 0.2)}, "",
         "rank 1 (b, pid 7) is alive, for 0 s at step 5, training, elsewhere"),
        ({rank: Heard(_word(pid=rank), 3.0) for rank in range(1, 8)}, "",
         "; ".join(f"rank {r} (b, pid {r}) has not been heard of for 3 s, last at step 5, training"
                   for r in range(1, 5)) + "; and 3 more ranks"),
    ],
)  # fmt: skip
def test_the_right_rank_is_blamed(others: dict[int, Heard | None], unreachable: str, expected: str) -> None:
    mine = _word(host="a", operation="here")
    assert whom_to_blame(others, rank=0, mine=mine, unreachable=unreachable)[0] == expected


def _leave(ours: Monitor, step: int, phase: str, error: Exception) -> str:
    """What the others, or the user, are told when the main thread ends by an error."""
    try:
        with ours:
            ours.at(step, phase)
            raise error
    except LostRankError as lost:
        return str(lost)


def _lose(ours: Monitor) -> str:
    return _leave(ours, 3, "training", RuntimeError(GLOO))


def test_a_rank_that_fails_tells_the_others_why() -> None:
    store = HashStore()
    first, second = (Monitor(store, rank=rank, world_size=2) for rank in range(2))
    with pytest.raises(ValueError, match="broken"):
        _leave(second, 2, "data", ValueError("broken"))
    said = _lose(first)
    assert said.startswith("rank 1 (")
    assert "ended at step 2, data (ValueError: broken); rank 0 (" in said
    assert "at step 3, training" in said
    assert "[RuntimeError: Connection closed by peer [127.0.0.1]:18642]" in said


def test_one_rank_says_it_for_all() -> None:
    store = HashStore()
    assert "rank 2 has never been heard of" in _lose(Monitor(store, rank=0, world_size=3))
    assert _lose(Monitor(store, rank=1, world_size=3)) == ""


class _CutStore:
    """A store behind a network that is cut: calls wait for ever."""

    def clone(self) -> _CutStore:
        return self

    def set(self, *_: str) -> None:
        threading.Event().wait()


def test_a_store_that_cannot_be_reached_holds_nobody_up() -> None:
    ours = Monitor(_CutStore(), rank=1, world_size=2)  # type: ignore[arg-type]
    begin = time.monotonic()
    assert _lose(ours).startswith("rank 1 cannot reach the store at ")
    assert time.monotonic() - begin < 10


def test_a_store_that_goes_away_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    ours = Monitor(store, rank=0, world_size=2)
    with ours:
        monkeypatch.setattr(Heartbeat, "_round", lambda *_: (_ for _ in ()).throw(dist.DistNetworkError("gone")))
        time.sleep(0.3)
        ours.at(1, "training")


def _given_up(monkeypatch: pytest.MonkeyPatch, phase: str, seconds: float, moves: bool) -> list[int]:
    """Exit codes by which a monitor of a timeout of 0.3 s ends a process that stays in `phase` for some seconds."""
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ours._saying.release()  # the process would not live on
        ended.set()

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(monitor.os, "write", lambda *_: None)
    with Monitor(HashStore(), rank=0, world_size=2, timeout=0.3) as ours:
        ours.at(3, phase)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not ended.is_set():
            time.sleep(0.02)
            if moves:
                ours.moved()
    return codes


def test_no_progress_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _given_up(monkeypatch, "data", 10, moves=False) == [76]


@pytest.mark.parametrize(("phase", "moves"), [("evaluation", True), (RECORDS, False)])
def test_progress_or_the_opening_of_records_do_not(monkeypatch: pytest.MonkeyPatch, phase: str, moves: bool) -> None:
    assert _given_up(monkeypatch, phase, 1.0, moves=moves) == []


def test_alone_it_does_nothing() -> None:
    before = threading.active_count()
    with Monitor() as ours:
        ours.at(1, "training")
        ours.moved()
        assert threading.active_count() <= before


def test_where_a_thread_stands() -> None:
    beat = Heartbeat(HashStore(), 0, 2, _word, 1.0)
    waiting = threading.Thread(target=beat.first_to_say, args=(1.0,), daemon=True)
    waiting.start()
    time.sleep(0.1)
    said = operation_of_thread(waiting.ident or 0)
    assert said.startswith("wait in first_to_say (training/ranks/heartbeat.py:")
    waiting.join()
    assert operation_of_thread(waiting.ident or 0) == ""


def test_where_an_error_came_from() -> None:
    with pytest.raises(ValueError, match="none of them") as caught:
        build_backbone("none of them", embedding_size=16)
    assert "build_backbone (backbones/__init__.py:" in operation_of_error(caught.value.__traceback__)
