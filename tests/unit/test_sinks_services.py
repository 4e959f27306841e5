"""What arrives at MLflow and Weights & Biases, read by their own libraries; servers that are not there."""

from __future__ import annotations

import json
import math
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from configs.load import load_config, to_yaml
from configs.monitor import MonitorConfig
from configs.schema import ConfigError
from data.contact_sheet import Pixels
from tests.sinks import NOT_FINITE, ODD, Report, free_port, picture
from training.sinks import build_sinks, queued


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "_PAUSES_S", (0.01, 0.01, 0.02))
    monkeypatch.setattr(queued, "FLUSH_S", 20.0)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`store()`: runs of the store of this test, oldest first, read by MLflow itself."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs half a minute for its tables
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=str(tmp_path / "store"))

    class Store:
        uri = f"mlflow_uri={tmp_path / 'store'}"

        def __call__(self) -> list[Any]:
            experiment = client.get_experiment_by_name("clusterface")
            return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]))

        def history(self, run: str, name: str) -> list[tuple[int, float]]:
            return [(point.step, point.value) for point in client.get_metric_history(run, name)]

        def picture(self, run: str, path: str) -> Pixels:
            return np.asarray(Image.open(client.download_artifacts(run, path)))

        delete = client.delete_run

    return Store()


def test_mlflow_has_values_settings_and_pictures(report: Report, store: Any, lines: list[str], tmp_path: Path) -> None:
    began = int(1000 * time.time())
    sinks = report(store.uri)
    sinks.scalars(10, ODD | NOT_FINITE)
    sinks.scalars(20, {"loss/total": 0.5})
    sinks.picture(20, "verification/lfw é", picture())
    sinks.close()
    sinks.close()
    (run,) = store()
    identity = (tmp_path / "my run" / "mlflow_run").read_text().strip()
    assert (run.info.run_id, run.info.run_name, run.info.status) == (identity, "my run", "FINISHED")
    assert lines == [f"MLflow: run {identity} of experiment clusterface in {tmp_path / 'store'}"]
    assert store.history(identity, "loss/total") == [(10, 1.5), (20, 0.5)]
    values = dict(run.data.metrics)
    assert math.isnan(values.pop("a/nan"))
    assert (values.pop("a/inf"), values.pop("a/low"), values.pop("loss/total")) == (math.inf, -math.inf, 0.5)
    assert values.pop("verification/lfw__/tar_far_1e-3") == 0.25
    assert list(values.values()) == [0.75]
    point = next(metric for metric in run.data._metric_objs if metric.key == "loss/total")
    assert began <= point.timestamp <= 1000 * time.time()
    settings = yaml.safe_load(to_yaml(load_config(None, [f"monitor.{store.uri}"])))
    assert len(run.data.params) == sum(map(len, settings.values()))
    assert run.data.params["optim.lr"] == "0.1"
    assert run.data.params["eval.sets"] == "[]"
    assert run.data.params["clustering.start"] == "''"
    shown = store.picture(identity, "pictures/verification/lfw__/step_000000020.png")
    assert (shown == picture()).all()


def test_a_resumed_run_goes_on_in_mlflow_and_another_does_not(report: Report, store: Any) -> None:
    for step, resumed in ((10, False), (8, True), (1, False)):
        sinks = report(store.uri, f"mlflow_experiment={'clusterface'}", resumed=resumed)
        sinks.scalars(step, {"loss": float(step)})
        sinks.close(failed=not resumed)
    first, second = store()
    assert store.history(first.info.run_id, "loss") == [(10, 10.0), (8, 8.0)]
    assert store.history(second.info.run_id, "loss") == [(1, 1.0)]
    assert (first.info.status, second.info.status) == ("FINISHED", "FAILED")
    store.delete(second.info.run_id)
    report(store.uri, resumed=True).close()  # that run was thrown away: another one
    assert len(store()) == 2


def test_a_run_that_mlflow_does_not_know_is_begun_anew(report: Report, store: Any, tmp_path: Path) -> None:
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "mlflow_run").write_text(32 * "a")
    report(store.uri, resumed=True).close()
    (run,) = store()
    assert (tmp_path / "my run" / "mlflow_run").read_text().strip() == run.info.run_id


@pytest.mark.parametrize("answers", [False, True], ids=["nobody there", "never answers"])
def test_an_mlflow_server_that_does_not_answer_holds_nobody_up(
    answers: bool, report: Report, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(queued, "FLUSH_S", 1.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()
        began = time.monotonic()
        sinks = report(f"mlflow_uri=http://127.0.0.1:{server.getsockname()[1]}")
        for step in range(5):
            sinks.scalars(step, {"loss": 1.0})
        told = time.monotonic()
        time.sleep(0.5)
        sinks.close()
        assert time.monotonic() - told < 4
    assert told - began < 5, "importing it takes its time"
    assert len(lines) == (1 if answers else 2)
    assert "5 " in lines[-1]
    assert "lost" in lines[-1]
    if not answers:
        assert lines[0].startswith("MLflow: cannot report (API request to http://127.0.0.1:")
        assert lines[0].endswith("): training goes on, and tries it again")


KEY = "f00d" * 10


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """It knows nothing of whoever runs this, and has only a key that is none."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    for name, value in {"MODE": "offline", "API_KEY": KEY, "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # its settings are read again
    yield wandb
    wandb.teardown()


def _records(path: Path) -> Iterator[Any]:
    """What an offline run wrote: records of LevelDB's log format, in blocks of 32 KiB, each a message of wandb's."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header: the next block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def _offline(output: Path) -> list[tuple[Any, list[dict[str, Any]]]]:
    """The run and its history, of each process, oldest first."""
    sys.modules["wandb"].teardown()  # until then its process writes
    found = []
    for path in sorted(output.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        records = list(_records(path))
        run = next(record.run for record in records if record.HasField("run"))
        history = [record.history for record in records if record.HasField("history")]
        found.append(
            (run, [{".".join(item.nested_key): json.loads(item.value_json) for item in each.item} for each in history])
        )
    return found


def _folder(output: Path) -> Path:
    return next(output.glob("wandb/offline-run-*"))


def test_weights_and_biases_has_values_settings_and_pictures_and_no_key(
    wandb: Any, report: Report, lines: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my run"
    sinks = report("wandb_project=faces")
    sinks.scalars(10, ODD | NOT_FINITE)
    sinks.picture(10, "verification/lfw é", picture())
    sinks.close()
    sinks.close()
    ((run, history),) = _offline(output)
    identity = (output / "wandb_run").read_text().strip()
    assert (run.run_id, run.project, run.display_name) == (identity, "faces", "my run")
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["optim"]["lr"] == 0.1
    assert settings["train"]["output"] == str(output)
    values, shown = history
    assert math.isnan(values["a/nan"])
    assert (values["a/inf"], values["a/low"], values["loss/total"]) == (math.inf, -math.inf, 1.5)
    assert values["verification/lfw__/tar_far_1e-3"] == 0.25
    assert values["step"] == shown["step"] == 10
    assert abs(values["_timestamp"] - time.time()) < 60
    file = next(output.glob("wandb/offline-run-*/files/media/images/**/*.png"))
    assert (np.asarray(Image.open(file)) == picture()).all()
    assert lines == [f"Weights & Biases: kept in {_folder(output)}, which wandb sync sends"]
    assert capfd.readouterr() == ("", "")
    assert not [path for path in output.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_resumed_run_has_the_same_identity_at_weights_and_biases(wandb: Any, report: Report, tmp_path: Path) -> None:
    for step, resumed in ((10, False), (8, True), (1, False)):
        sinks = report("wandb_project=faces", resumed=resumed)
        sinks.scalars(step, {"loss": float(step)})
        sinks.close()
    (first, _), (second, values), (third, _) = _offline(tmp_path / "my run")
    assert first.run_id == second.run_id != third.run_id
    assert [(value["step"], value["loss"]) for value in values] == [(8, 8.0)]


def test_without_a_server_of_weights_and_biases_all_is_kept(
    wandb: Any, report: Report, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("training.sinks.wandb.FLUSH_S", 2.5)
    monkeypatch.setattr("training.sinks.wandb._TRIES", 1)
    sinks = report("wandb_project=faces")
    sinks.scalars(10, {"loss": 0.5})
    deadline = time.monotonic() + 20
    while len(lines) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    sinks.close()
    assert lines[0].startswith("Weights & Biases: cannot report (")
    assert lines[0].endswith("): training goes on, and tries it again")
    assert lines[1:] == [
        f"Weights & Biases: kept in {_folder(tmp_path / 'my run')}, which wandb sync sends",
        "Weights & Biases: reports again; 0 reports are lost",
    ]
    ((_, history),) = _offline(tmp_path / "my run")
    assert [value["loss"] for value in history] == [0.5]


@pytest.mark.parametrize(("name", "value"), [("BASE_URL", "http://127.0.0.1:999999"), ("MODE", "nonsense")])
def test_wrong_settings_of_weights_and_biases_are_named_before_training(
    name: str, value: str, wandb: Any, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setenv(f"WANDB_{name}", value)
    with pytest.raises(
        ConfigError, match=r"monitor\.wandb_project: wandb refuses its settings \(.*Input should be"
    ) as error:
        build_sinks(MonitorConfig(wandb_project="faces"), lines.append)
    assert "\n" not in str(error.value)
