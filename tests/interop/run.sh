#!/bin/sh
# run.sh: genuine mxnet reads what we write, record for record, and we read what it writes; OpenCV is for its im2rec.py.
# PYTHON_INTEROP: a Python of 3.8 to 3.11, the ones numpy 1.23.5 has packages for; the default is the first one found.
# PYTHON: the one that runs our side; default .venv/bin/python.
set -eu
cd "$(dirname "$0")/../.."
venv=.venv-interop
ours=${PYTHON:-.venv/bin/python}
packages="mxnet==1.9.1 numpy==1.23.5 opencv-python-headless==4.8.1.78"

fits() {
    "$1" -c 'import sys; sys.exit(not (3, 8) <= sys.version_info[:2] <= (3, 11))' >/dev/null 2>&1
}

command -v "$ours" >/dev/null 2>&1 || {
    echo "error: expected our environment at $ours: run 'make setup' first" >&2
    exit 2
}
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import cv2, mxnet' >/dev/null 2>&1; then
    if [ -n "${PYTHON_INTEROP:-}" ]; then
        fits "$PYTHON_INTEROP" || {
            echo "error: PYTHON_INTEROP=$PYTHON_INTEROP: expected Python 3.8 to 3.11 (mxnet 1.9.1 needs numpy 1.23.5)," \
                "got $("$PYTHON_INTEROP" --version 2>&1 | tail -n 1)" >&2
            exit 2
        }
        python=$PYTHON_INTEROP
    else
        python=
        for name in python3.11 python3.10 python3.9 python3.8 python3; do
            if fits "$name"; then python=$name && break; fi
        done
        [ -n "$python" ] || {
            echo "error: expected Python 3.8 to 3.11 (mxnet 1.9.1 needs numpy 1.23.5), found none:" \
                "name one with PYTHON_INTEROP=/path/to/python3.11" >&2
            exit 2
        }
    fi
    echo "installing $packages into $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $packages
fi
exec "$ours" -m tests.interop.compare "$venv/bin/python"
