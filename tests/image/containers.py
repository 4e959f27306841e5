"""Containers of a built image under runc, as Kubernetes starts them: read-only root, no capability, not root, PID 1."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.launches import Launch

HOST = "trainer"


def image_settings(name: str) -> dict[str, Any]:
    """Entrypoint, Env, User, WorkingDir, Healthcheck … of an image that buildah has built."""
    done = subprocess.run(["buildah", "inspect", "--type", "image", name], text=True, capture_output=True, check=True)
    settings: dict[str, Any] = json.loads(done.stdout)["Docker"]["config"]
    return settings


class Mounted:
    """The image's files, as a folder; a context manager."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> Path:
        self._container = _buildah("from", "--pull-never", self._name)
        return Path(_buildah("mount", self._container))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _buildah("umount", self._container)
        _buildah("rm", self._container)


def _buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Container(Launch):
    """One container; a context manager. Its exit code is that of `process`, what it says on stderr is in `told`.

    command: arguments of `entrypoint`, the image's own by default. mounts: folders here by the place where they are in
    the container, read-only but for those of `writable`.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any],
        bundle: Path,
        command: Sequence[str],
        *,
        mounts: Mapping[str, Path],
        writable: Sequence[str],
        environment: Mapping[str, str] | None = None,
        entrypoint: Sequence[str] | None = None,
    ) -> None:
        self.name = f"clusterface-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._bundle = bundle / self.name
        self._bundle.mkdir()
        first = settings["Entrypoint"] if entrypoint is None else entrypoint
        mounts = {**mounts, "/etc/hosts": self._bundle / "hosts"}  # every runtime brings one
        description = _description(root, settings, [*first, *command], mounts, writable, environment or {})
        (self._bundle / "config.json").write_text(json.dumps(description), encoding="utf-8")
        (self._bundle / "hosts").write_text(f"127.0.0.1 localhost {HOST}\n", encoding="utf-8")
        become = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"  # a Launch begins Python
        runc = ["runc", "run", "--bundle", str(self._bundle), self.name]
        super().__init__(["-c", become, *runc], cwd=bundle, environment=os.environ)

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["runc", "delete", "--force", self.name], capture_output=True, check=False)
        super().__exit__(kind, error, trace)

    def kill(self, name: str) -> None:
        """Send the signal to PID 1, and to nothing else, as container runtimes do."""
        subprocess.run(["runc", "kill", self.name, name], check=True)

    def ended(self, within: float) -> int:
        """Wait for its exit code."""
        return self.process.wait(within)

    def run(self, *command: str, environment: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Another command in it, as HEALTHCHECK does."""
        more = [word for setting in environment for word in ("--env", setting)]
        return subprocess.run(
            ["runc", "exec", *more, self.name, *command], text=True, capture_output=True, check=False, timeout=60
        )


def _description(
    root: Path,
    settings: Mapping[str, Any],
    arguments: Sequence[str],
    mounts: Mapping[str, Path],
    writable: Sequence[str],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """The OCI runtime's config.json. The network is this machine's."""
    user, _, group = settings["User"].partition(":")
    none: list[str] = []
    temporary = ["nosuid", "nodev", "mode=1777"]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root), "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": int(user), "gid": int(group)},
            "args": list(arguments),
            "env": [*settings["Env"], *(f"{key}={value}" for key, value in environment.items())],
            "cwd": settings["WorkingDir"],
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), none),
            "noNewPrivileges": True,
        },
        "hostname": HOST,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": temporary},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": temporary},
            *(
                {
                    "destination": place,
                    "type": "bind",
                    "source": str(folder),
                    "options": ["rbind", "rw" if place in writable else "ro"],
                }
                for place, folder in mounts.items()
            ),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    }
