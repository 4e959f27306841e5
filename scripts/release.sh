#!/bin/sh
# release.sh FOLDER: an sdist, a wheel made from that sdist, and a look at the wheel in a clean environment.
# The environment lies outside of the tree and holds the wheel alone; what the wheel needs is taken from .venv, by a path.
# With this nothing of the tree can be imported by accident: recipes and modules that a wheel lacks are missed here.
set -eu
cd "$(dirname "$0")/.."
tree=$PWD
python=${PYTHON:-$tree/.venv/bin/python}
out=${1:-runs/dist}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip --version >/dev/null 2>&1 || {
    echo "error: expected our environment at $python: run 'make setup' first" >&2
    exit 2
}
version=$("$python" setup.py --version 2>/dev/null | tail -n 1)
rm -f "$out/clusterface-$version"*

# setuptools is pinned, so its backend is called as it is, on a copy, in which it may leave what it likes.
build() { # build KIND FOLDER
    (cd "$2" && "$python" -c "import sys; from setuptools import build_meta; build_meta.build_$1(sys.argv[1])" "$out") \
        >"$work/build.log" 2>&1 || {
        cat "$work/build.log" >&2
        exit 1
    }
}
packages=$(sed -n 's/^_PACKAGES = \[\(.*\)\]$/\1/p' setup.py | tr -d '",')
mkdir "$work/source" "$work/unpacked" "$work/elsewhere"
# shellcheck disable=SC2086
cp -R setup.py pyproject.toml README.md LICENSE MANIFEST.in constraints.txt CHANGELOG.md sharding.py train_dist.py \
    $packages "$work/source/"
find "$work/source" -name __pycache__ -prune -exec rm -rf {} +
build sdist "$work/source"
tar -xzf "$out/clusterface-$version.tar.gz" -C "$work/unpacked" --strip-components 1
build wheel "$work/unpacked"
wheel=$out/clusterface-$version-py3-none-any.whl

"$python" -m venv --without-pip "$work/clean"
site=$("$work/clean/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$site" "$wheel"
"$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$site/needed.pth"
cd "$work/elsewhere"
cat >look.py <<'PY'
import importlib, pathlib, sys

site, tree = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
names = sys.argv[3].split()
suffixes = (".py", ".yaml")


def files_below(folder):
    return {path.relative_to(folder).as_posix() for name in names for path in (folder / name).rglob("*") if path.suffix in suffixes}


for name in names:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(site), (name, module.__file__)
shipped, expected = files_below(site), files_below(tree)
assert shipped == expected, shipped ^ expected
from configs.load import load_config

recipes = sorted((site / "configs").glob("*.yaml"))
assert recipes and all(load_config(path) for path in recipes)
import train_dist

for name in ("clustering", "evaluation", "training"):
    importlib.import_module(f"{name}.__main__")
assert pathlib.Path(train_dist.__file__).is_relative_to(site)
print(f"{len(shipped)} modules and recipes, {len(recipes)} of them recipes, are in the wheel")
PY
clean="env -u PYTHONPATH $work/clean/bin/python"
$clean look.py "$site" "$tree" "$packages"
$clean -m data --help >/dev/null
printf 'from easydict import EasyDict as edict\nconfig = edict()\nconfig.network = "r50"\n' >peer.py
expect() { # expect TEXT COMMAND …: that the command prints it
    text=$1
    shift
    printed=$("$@" 2>&1) || { echo "error: $* failed: $printed" >&2; exit 1; }
    case $printed in *"$text"*) ;; *) echo "error: $* printed '$printed', not '$text'" >&2; exit 1 ;; esac
}
expect "backbone: iresnet50" $clean -m configs from-insightface peer.py
expect "16 images of 4 identities" $clean -m data pack synthetic --out set --identities 4 --images-per-identity 4 \
    --verification-identities 5 --pairs 10 --workers 1
echo "$out/clusterface-$version.tar.gz"
echo "$wheel"
