"""Other places to report to: their settings, the names of tags, identities kept, libraries that are missing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.extras import installing
from configs.load import load_config
from configs.monitor import MonitorConfig
from configs.schema import ConfigError
from training.checkpoint.errors import CheckpointError
from training.checkpoint.same_run import refuse_another_run
from training.sinks import base, build_sinks
from training.sinks.base import Names, keep_id, kept_id, library, plain, run_name, said

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("wandb_project=a/b", "monitor.wandb_project: expected a name of at most 128 signs without any of /"),
        (f"wandb_project={129 * 'a'}", "monitor.wandb_project: expected a name of at most 128 signs"),
        ("wandb_project='a\\nb'", "monitor.wandb_project: expected a name"),
        ("mlflow_experiment=", "monitor.mlflow_experiment: expected text"),
        ("mlflow_experiment=' '", "monitor.mlflow_experiment: expected a name, got ' '"),
        ("prometheus_address=''", "monitor.prometheus_address: expected a name, got ''"),
        ("prometheus_port=65536", "monitor.prometheus_port: expected 0 (none) to 65535, got 65536"),
        ("prometheus_port=-1", "monitor.prometheus_port: expected 0 (none) to 65535, got -1"),
        ("prometheus_port=http", "monitor.prometheus_port: expected a whole number, got 'http'"),
        ("prometheus_host=x", "monitor.prometheus_host: unknown setting; did you mean monitor.prometheus_port?"),
    ],
)
def test_mistakes_in_the_settings_are_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"monitor.{setting}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["https://me:hunter2@host:5000", "https://hunter2@host", "http://host/?token=hunter2"])
def test_addresses_with_credentials_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.mlflow_uri: .*MLFLOW_TRACKING_PASSWORD") as error:
        load_config(None, [f"monitor.mlflow_uri={uri}"])
    assert "hunter2" not in str(error.value)


def test_nothing_is_on_by_default_and_all_may_change_on_resume(lines: list[str]) -> None:
    assert build_sinks(MonitorConfig(), lines.append)._sinks == []
    now: dict[str, dict[str, Any]] = {"monitor": dict.fromkeys(MonitorConfig.__dataclass_fields__, "new")}
    refuse_another_run("x", {}, now)
    with pytest.raises(CheckpointError):
        refuse_another_run("x", {}, {"monitor": {"another": 1}})


def test_no_two_tags_have_the_same_name() -> None:
    names = Names(plain, taken=["taken"])
    assert names("loss/margin") == "loss/margin"
    assert names("a@b=1e-3") == "a_b_1e-3"
    tags = ["a b", "a_b", "a/b", "//a///b/", "", "/", "..", "../x", "taken", "x" * 300, "x" * 301, "\udcff", "é", "."]
    spelled = [names(tag) for tag in tags]
    assert len(set(spelled)) == len(tags)
    assert [names(tag) for tag in tags] == spelled
    assert all(0 < len(name) < 220 and ".." not in name and not name.startswith("/") for name in spelled)


def test_the_identity_of_a_run_is_kept_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert kept_id(path) == ""
    keep_id(path, "ab12-_")
    assert kept_id(path) == "ab12-_"
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    for content in (b"", b"\n", b"\xff\xfe\x00", b"../../x", b"a b", b"x" * 65, random.Random(0).randbytes(4096)):
        path.write_bytes(content)
        assert kept_id(path) == ""
    assert kept_id(tmp_path) == ""
    keep_id(tmp_path / "run" / "below a file", "a")  # nowhere to keep it: the run goes on all the same


def test_the_name_of_a_run_is_that_of_its_folder(tmp_path: Path) -> None:
    assert run_name(tmp_path / "ms1m r50") == "ms1m r50"
    assert run_name(Path("/")) == "clusterface"
    assert run_name(Path("runs/\udcff")) == "?"
    assert len(run_name(Path("é" * 1000))) == 200


def test_errors_are_one_line_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "")
    assert said(ValueError("key hunter2\nis \x1b[31mwrong")) == "key … is ?[31mwrong"
    assert said(TimeoutError()) == "TimeoutError"
    assert len(said(ValueError("x" * 1000))) == 301


@pytest.mark.parametrize(
    ("setting", "module", "extra"),
    [
        ("wandb_project=faces", "wandb", "wandb"),
        ("mlflow_uri=http://127.0.0.1:9", "mlflow", "mlflow"),
        ("prometheus_port=9400", "prometheus_client", "prometheus"),
    ],
)
@pytest.mark.parametrize("error", [None, TypeError("Descriptors cannot be created directly.\nIf this call …")])
def test_a_library_that_is_missing_or_broken_is_named_before_training(
    setting: str, module: str, extra: str, error: Exception | None, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    if error is None:
        monkeypatch.setitem(sys.modules, module, None)
    else:

        def fail(_: str) -> None:
            raise error

        monkeypatch.setattr(base.importlib, "import_module", fail)
    with pytest.raises(ConfigError) as caught:
        build_sinks(load_config(None, [f"monitor.{setting}"]).monitor, lines.append)
    assert str(caught.value).startswith(f"monitor.{setting.partition('=')[0]}: {module} does not load (")
    assert str(caught.value).endswith(f"leave it empty, or, {installing(extra)}")
    assert "\n" not in str(caught.value)


def test_libraries_are_loaded_only_where_they_are_asked_for() -> None:
    code = (
        "import sys; from training.sinks import build_sinks; from configs.monitor import MonitorConfig\n"
        "build_sinks(MonitorConfig(), print)\n"
        "print([name for name in ('wandb', 'mlflow', 'prometheus_client') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
    assert library("json", "x", "y") is json
