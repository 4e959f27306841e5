#!/bin/sh
# make_venv.sh PYTHON VENV: a virtual environment with the exact versions of constraints.txt, or a clear reason why not.
set -eu
python=$1
venv=$2

command -v "$python" >/dev/null 2>&1 || {
    echo "error: no $python here: install Python 3.10 or newer, or name one with 'make PYTHON=python3.12'" >&2
    exit 2
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: expected Python 3.10 or newer, got $("$python" --version): name another with 'make PYTHON=python3.12'" >&2
    exit 2
}

# Debian ships Python without ensurepip; the venv module then cannot put pip into a new environment.
if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing python3-venv, which Debian keeps apart from python3"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv
    else
        echo "error: $python cannot create virtual environments: run 'sudo apt-get install python3-venv' and try again" >&2
        exit 2
    fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing the packages of constraints.txt into $venv (some minutes the first time)"
"$venv/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dali,dev]'
