#!/usr/bin/env bash
# A virtual environment that runs all of slime_opd on a Linux machine without a GPU.
#
#   tools/setup_cpu.sh [DIRECTORY]      (default: .venv)
#
# pip alone cannot do it: SGLang's own requirements bring some 11 GB of CUDA packages and then need
# a driver, so SGLang is installed without them, after the packages that it needs on a CPU (the
# cpu extra in setup.py). A second run finds its work done. PYTHON names the interpreter.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${1:-.venv}
PYTHON=${PYTHON:-python3}
TORCH=torch==2.13.0
SGLANG=sglang==0.5.9
NEEDED_GB=5

fail() {
   echo "setup_cpu: error: $*" >&2
   exit 1
}

step() { # what, command…
   echo "setup_cpu: $1"
   shift
   "$@" || fail "'$*' failed; its output above says why (is a package index in reach?)"
}

[ "$(uname -s)" = Linux ] || fail "found $(uname -s), expected Linux: SGLang's CPU engine runs nowhere else"
command -v "$PYTHON" >/dev/null || fail "found no $PYTHON, expected Python 3.11 or newer; name one with PYTHON=…"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
   fail "found $("$PYTHON" --version 2>&1) at $(command -v "$PYTHON"), expected 3.11 or newer; name one with PYTHON=…"
if [ "${CUDA_VISIBLE_DEVICES-unset}" != "" ] && nvidia-smi -L >/dev/null 2>&1; then
   fail "this machine has a CUDA GPU: use pip install -e '.[gpu]', or set CUDA_VISIBLE_DEVICES= to go on without it"
fi

STAMP=$VENV/.slime_opd_setup
WANTED=$({ cat "$ROOT/setup.py" "${BASH_SOURCE[0]}"; echo "$ROOT"; "$PYTHON" --version; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; then
   echo "setup_cpu: $VENV is up to date"
   exit 0
fi

if [ ! -x "$VENV/bin/python" ]; then
   mkdir -p "$VENV" || fail "cannot make the directory $VENV"
   FREE_GB=$(($(df -Pk "$VENV" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
   [ "$FREE_GB" -ge "$NEEDED_GB" ] || fail "found $FREE_GB GB free for $VENV, expected at least $NEEDED_GB"
   step "making $VENV" "$PYTHON" -m venv "$VENV"
fi
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check -qq)
step "installing $TORCH" "${PIP[@]}" install "$TORCH"
step "installing slime_opd with what its CPU stack needs (a minute or two)" "${PIP[@]}" install -e "$ROOT[cpu,test]"
step "installing $SGLANG without its CUDA packages" "${PIP[@]}" install --no-deps "$SGLANG"
step "checking that it imports" "$VENV/bin/python" -W ignore -c 'import httpx, mbridge, megatron.core, ray, sglang, slime_opd, torch'
echo "$WANTED" >"$STAMP"
echo "setup_cpu: done; use it with: source $VENV/bin/activate"
