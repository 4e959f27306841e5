"""No source loads what can run code, starts a shell or unpacks an archive: read from the code, names resolved.

What is hidden from reading (`getattr(torch, "lo" + "ad")`) is not found; each rule is held by examples that break it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESTRICTED = ("data/verification_bin.py", "_Unpickler")
"""The one class that may use Python's unpickler: it resolves no name to the real thing."""
FORBIDDEN = {
    "torch.jit.load": "code in a file",
    "torch.hub.load": "code from elsewhere",
    "torch.package.PackageImporter": "code in a file",
    "yaml.full_load": "yaml",
    "yaml.full_load_all": "yaml",
    "yaml.unsafe_load": "yaml",
    "yaml.unsafe_load_all": "yaml",
    "eval": "code from data",
    "exec": "code from data",
    "compile": "code from data",
    "__import__": "code from data",
    "os.system": "shell",
    "os.popen": "shell",
    "subprocess.getoutput": "shell",
    "subprocess.getstatusoutput": "shell",
    "tempfile.mktemp": "a name that another may take",
    "shutil.unpack_archive": "unpacking",
}
PICKLES = {"load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"}
PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
WEAK = {"hashlib.md5", "hashlib.sha1"}
OWN_FILES = ("benchmarks", "setup.py")
"""Where arrays are read that the same program wrote: numpy's default, which is not to unpickle, will do."""


def sources() -> list[Path]:
    skipped = {"tests", "runs", "build", "dist"}
    tops = [top for top in ROOT.iterdir() if top.name not in skipped and not top.name.startswith(".")]
    nested = (path for top in tops if top.is_dir() for path in top.rglob("*.py"))
    return sorted([*nested, *(top for top in tops if top.suffix == ".py")])


def _aliases(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id).removeprefix("builtins.")
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value, aliases)
        return f"{before}.{node.attr}".removeprefix("builtins.") if before else ""
    return ""


def _option(call: ast.Call, name: str) -> object:
    """Its constant value; None: not given, or not to be read."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def _given(call: ast.Call, name: str) -> bool:
    return any(keyword.arg == name for keyword in call.keywords)


def findings(source: str, place: str) -> list[str]:
    """`line: rule` for all that breaks one. place: of the file below the repository."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    excused = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and (place, node.name) == RESTRICTED
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in excused:
            continue
        if isinstance(node, ast.ImportFrom):
            rules = [rule for alias in node.names for rule in _of_name(f"{node.module}.{alias.name}")]
        elif isinstance(node, ast.Name | ast.Attribute):
            rules = _of_name(_dotted(node, aliases)) if isinstance(node.ctx, ast.Load) else []
        elif isinstance(node, ast.Call):
            rules = list(_of_call(node, _dotted(node.func, aliases), aliases, place))
        else:
            rules = []
        found += [f"{node.lineno}: {rule}" for rule in rules]
    return found


def _of_name(name: str) -> list[str]:
    module, _, last = name.rpartition(".")
    rules = [FORBIDDEN[name]] if name in FORBIDDEN else []
    if module in PICKLE_MODULES and last in {*PICKLES, "open"}:
        rules.append("pickle")
    if last == "read_pickle":
        rules.append("pickle")
    if last in OBJECT_COLLECTIVES:
        rules.append("pickle between ranks")
    return rules


def _of_call(call: ast.Call, name: str, aliases: dict[str, str], place: str) -> Iterator[str]:
    if name in ("torch.load", "torch.serialization.load") and _option(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.load_all"):
        given = [keyword.value for keyword in call.keywords if keyword.arg == "Loader"] or call.args[1:2]
        if not given or _dotted(given[0], aliases) not in SAFE_LOADERS:
            yield "yaml"
    if name in ("numpy.load", "numpy.lib.format.read_array"):
        own = place.startswith(OWN_FILES) and not _given(call, "allow_pickle")
        if not own and _option(call, "allow_pickle") is not False:
            yield "numpy.load without allow_pickle=False"
    if _given(call, "shell") and _option(call, "shell") is not False:
        yield "shell"
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("extract", "extractall"):
        yield "unpacking"
    weak = name in WEAK or (
        name == "hashlib.new" and not (call.args and getattr(call.args[0], "value", None) in ("sha256", "sha512"))
    )
    if weak and _option(call, "usedforsecurity") is not False:
        yield "a hash that is forged"


def test_there_are_sources() -> None:
    places = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert len(places) > 150
    assert {"train_dist.py", "sharding.py", "data/verification_bin.py", "evaluation/embed/records.py"} <= places
    assert not [place for place in places if place.startswith(("tests", "."))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_loads_what_can_run_code(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


BREACHES = {
    "torch.load without weights_only=True": [
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import torch\ntorch.load(f, **options)",
        "import torch as t\nt.load(f)",
        "from torch import load\nload(f)",
        "from torch import serialization as s\ns.load(f)",
    ],
    "code in a file": ["import torch\ntorch.jit.load(f)", "from torch.jit import load as g\ng(f)"],
    "code from elsewhere": ["import torch\ntorch.hub.load('a', 'b')"],
    "pickle": [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads\nloads(b)",
        "import pickle\nread = pickle.loads",
        "import pickle\nclass _Unpickler(pickle.Unpickler): pass",
        "import pickle\npickle._Unpickler(f).load()",
        "import cloudpickle\ncloudpickle.loads(b)",
        "import joblib\njoblib.load(f)",
        "import marshal\nmarshal.loads(b)",
        "import shelve\nshelve.open(f)",
        "import pandas\npandas.read_pickle(f)",
    ],
    "pickle between ranks": [
        *(f"import torch.distributed as dist\ndist.{name}(a, b)" for name in sorted(OBJECT_COLLECTIVES)),
        "from torch.distributed import all_gather_object",
        "import torch\ntorch.distributed.distributed_c10d.gather_object(a)",
    ],
    "yaml": [
        "import yaml\nyaml.load(t)",
        "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "import yaml\nyaml.load(t, yaml.FullLoader)",
        "import yaml\nyaml.load_all(t, Loader=kind)",
        "import yaml\nyaml.unsafe_load(t)",
        "from yaml import full_load\nfull_load(t)",
    ],
    "code from data": [
        "eval(t)",
        "exec(t)",
        "compile(t, '', 'exec')",
        "import builtins\nbuiltins.eval(t)",
        "from builtins import exec as run\nrun(t)",
        "__import__(t)",
    ],
    "shell": [
        "import subprocess\nsubprocess.run(c, shell=True)",
        "from subprocess import Popen\nPopen(c, shell=flag)",
        "import os\nos.system(c)",
        "import os\nos.popen(c)",
        "import subprocess\nsubprocess.getoutput(c)",
    ],
    "unpacking": [
        "import tarfile\ntarfile.open(f).extractall()",
        "import tarfile\nwith tarfile.open(f) as tar: tar.extract(m)",
        "import zipfile\nzipfile.ZipFile(f).extractall(d)",
        "import shutil\nshutil.unpack_archive(f)",
    ],
    "numpy.load without allow_pickle=False": [
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy\nnumpy.load(f, None, flag)",
        "from numpy import load\nload(f, mmap_mode='r')",
        "import numpy as np\nnp.lib.format.read_array(f, allow_pickle=True)",
    ],
    "a name that another may take": ["import tempfile\ntempfile.mktemp()", "from tempfile import mktemp"],
    "a hash that is forged": [
        "import hashlib\nhashlib.md5(b)",
        "from hashlib import sha1\nsha1(b)",
        "import hashlib\nhashlib.new('md5', b)",
        "import hashlib\nhashlib.md5(b, usedforsecurity=True)",
    ],
}


@pytest.mark.parametrize(
    ("rule", "source"), [(rule, source) for rule, breaches in BREACHES.items() for source in breaches]
)
def test_each_rule_can_fail(rule: str, source: str) -> None:
    found = findings(source, "data/planted.py")
    assert rule in [text.partition(": ")[2] for text in found]
    assert {text.partition(": ")[2] for text in found} == {rule}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
        "import yaml\nyaml.safe_load(t)\nyaml.load(t, Loader=yaml.SafeLoader)",
        "import pickle\npickle.dump(a, f)\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "import re\nre.compile(t)\nnet.eval()\nmodel.compile()",
        "import subprocess\nsubprocess.run([c], shell=False)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import hashlib\nhashlib.sha256(b)\nhashlib.md5(b, usedforsecurity=False)\nhashlib.new('sha256')",
        "import tarfile\ntarfile.open(f).extractfile(m)",
    ],
)
def test_what_is_fine_is_let_pass(source: str) -> None:
    assert findings(source, "data/planted.py") == []


def test_the_restricted_unpickler_is_excused_where_it_stands_alone() -> None:
    text = (ROOT / RESTRICTED[0]).read_text(encoding="utf-8")
    assert findings(text, RESTRICTED[0]) == []
    assert findings(text, "data/another.py")
    assert findings(text.replace("class _Unpickler", "class _Other"), RESTRICTED[0])
    assert findings(f"{text}\npickle.loads(b'')\n", RESTRICTED[0])


def test_arrays_of_our_own_may_be_read_by_numpys_default() -> None:
    assert findings("import numpy as np\nnp.load(f)", "benchmarks/planted.py") == []
    assert findings("import numpy as np\nnp.load(f, allow_pickle=True)", "benchmarks/planted.py")
