#!/usr/bin/env bash
# Make a virtual environment for slime_opd on a Linux machine without a GPU.
#
#   tools/setup_cpu.sh [DIRECTORY]      (default: .venv)
#
# pip alone cannot do it: SGLang's requirements are 11 GB of CUDA packages that need a driver. So SGLang is
# installed without them, after the packages that it needs on a CPU (the cpu extra in setup.py). A second run
# does nothing if nothing has changed. PYTHON is the interpreter.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NAME=setup_cpu
VENV=${1:-.venv}
PYTHON=${PYTHON:-python3}
TORCH=torch==2.13.0
SGLANG=sglang==0.5.9
NEEDED_GB=5
STAMP=$VENV/.slime_opd_setup
# shellcheck source=tools/setup_common.sh
source "$ROOT/tools/setup_common.sh"

[ "$(uname -s)" = Linux ] || fail "found $(uname -s), expected Linux: SGLang's CPU engine runs nowhere else"
check_python "3.11 or newer" "sys.version_info >= (3, 11)"
if [ "${CUDA_VISIBLE_DEVICES-unset}" != "" ] && nvidia-smi -L >/dev/null 2>&1; then
   fail "this machine has a CUDA GPU: use tools/setup_gpu.sh, or set CUDA_VISIBLE_DEVICES= to ignore it"
fi

FINGERPRINT=$(fingerprint "${BASH_SOURCE[0]}")
if [ "$(cat "$STAMP" 2>/dev/null)" = "$FINGERPRINT" ]; then
   echo "setup_cpu: $VENV is up to date"
   exit 0
fi

make_venv
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check -qq)
step "installing $TORCH" "${PIP[@]}" install "$TORCH"
step "installing slime_opd with the requirements of its CPU stack (a minute or two)" "${PIP[@]}" install -e "${ROOT}[cpu,test]"
step "installing $SGLANG without its CUDA packages" "${PIP[@]}" install --no-deps "$SGLANG"
step "checking that it imports" "$VENV/bin/python" -W ignore -c 'import httpx, mbridge, megatron.core, ray, sglang, slime_opd, torch'
echo "$FINGERPRINT" >"$STAMP"
echo "setup_cpu: done; use it with: source $VENV/bin/activate"
