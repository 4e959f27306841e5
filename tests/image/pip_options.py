"""This machine's way to PyPI, handed into a build: what pip is told here by its files and its environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def pip_options(folder: Path) -> list[str]:
    """Options of the builder: a pip.conf as a secret, and folders of wheels and certificates as volumes.

    folder: gets the pip.conf and a copy of the certificates. Mirrors, local folders and the certificate are taken over,
    nothing else.
    """
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], text=True, capture_output=True, check=True)
    told: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        told.setdefault(name.rpartition(".")[2], value.strip("'"))  # the environment stands first
    options = ["--volume", f"{folder}:/pip:ro"]
    lines = ["[global]", *(f"{name} = {told[name]}" for name in ("index-url", "timeout") if name in told)]
    if certificate := told.get("cert"):
        shutil.copy(certificate, folder / "certificates.crt")
        lines.append("cert = /pip/certificates.crt")
    wheels = [Path(place) for place in told.get("find-links", "").split() if Path(place).is_dir()]
    for number, place in enumerate(wheels):
        options += ["--volume", f"{place}:/wheels/{number}:ro"]
    if wheels:
        lines.append("find-links = " + " ".join(f"/wheels/{number}" for number in range(len(wheels))))
    (folder / "pip.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [*options, "--secret", f"id=pip,src={folder / 'pip.conf'}"]
