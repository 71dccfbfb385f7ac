#!/usr/bin/env bash
# Make a virtual environment for slime_opd on Linux machines with NVIDIA GPUs.
#
#   tools/setup_gpu.sh [DIRECTORY]      (default: .venv)
#
#   PYTHON=python3.12    the interpreter: 3.11 or 3.12, for which SGLang's packages have wheels
#   WITHOUT_NVCC=1       do not require a CUDA toolkit; machines that run engines need one
#   WITH_FLASH_ATTN=1    build flash-attn too, for --attention-backend flash; takes long
#   MAX_JOBS=N           number of parallel compilers (default: one per core and per 4 GB of memory)
#
# pip alone cannot do it: Transformer Engine's PyTorch extension is a source distribution, and pip's isolated
# build compiles it for the newest torch, not for the version that SGLang pins. So SGLang is installed first,
# and the extension is compiled for the installed torch, with the CUDA headers of torch's own wheels. The
# versions are in setup.py, in the extras gpu, transformer-engine and flash-attn.
#
# It needs no GPU, so it can run on a login node or in a container build. It then lists the imports that it
# could not check; a second run on a machine with a GPU checks them.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NAME=setup_gpu
VENV=${1:-.venv}
PYTHON=${PYTHON:-python3}
CUDA=12.8 # the version for which SGLang's pinned torch is built
NEEDED_GB=20
# The modules that the last step imports: on any machine, and only with a driver.
IMPORTS="httpx mbridge megatron.core ray sglang.launch_server slime_opd.train torch transformer_engine.pytorch"
KERNELS="sgl_kernel sglang.srt.entrypoints.engine"
STAMP=$VENV/.slime_opd_setup
# shellcheck source=tools/setup_common.sh
source "$ROOT/tools/setup_common.sh"

has_driver() { # not nvidia-smi: a GPU may be hidden or busy; the kernels are linked to the driver's library
   "$PYTHON" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null
}

find_nvcc() { # in the places that SGLang's just-in-time compiler searches
   local nvcc
   if [ -n "${CUDA_HOME:-${CUDA_PATH:-}}" ]; then
      nvcc=${CUDA_HOME:-$CUDA_PATH}/bin/nvcc
   else
      nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
   fi
   [ -x "$nvcc" ] && echo "$nvcc"
}

check_nvcc() {
   local nvcc release
   nvcc=$(find_nvcc) || fail "found no nvcc in CUDA_HOME, PATH or /usr/local/cuda, expected a CUDA toolkit ($CUDA): SGLang compiles kernels when an engine starts; install it, or set WITHOUT_NVCC=1 if engines will run on other machines"
   release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
   [ "${release%%.*}" = "${CUDA%%.*}" ] ||
      fail "found CUDA $release at $nvcc, expected ${CUDA%%.*}.x ($CUDA is torch's own): name a toolkit with CUDA_HOME=…, or set WITHOUT_NVCC=1 if engines will run on other machines"
}

default_jobs() {
   local cores gigabytes
   cores=$(nproc)
   gigabytes=$(awk '/^MemAvailable/ { print int($2 / 1024 / 1024 / 4) }' /proc/meminfo)
   [ "$gigabytes" -ge 1 ] || gigabytes=1
   echo $((cores < gigabytes ? cores : gigabytes))
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
   fail "found $(uname -s) $(uname -m), expected Linux x86_64: torch's wheels on PyPI have CUDA nowhere else"
check_python "3.11 or 3.12" "sys.version_info[:2] in ((3, 11), (3, 12))"
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
   fail "found no Python.h for $PYTHON, expected Python's headers; install them (python3-dev, python3-devel)"
export CXX=${CXX:-g++}
command -v "$CXX" >/dev/null || fail "found no C++ compiler $CXX, expected g++ 9 or newer; install it, or set CXX=…"
"$PYTHON" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
   fail "found no libnuma.so.1, expected it: SGLang's kernels are linked to it; install it (libnuma1, numactl-libs)"
[ -z "${WITHOUT_NVCC:-}" ] || [ -z "${WITH_FLASH_ATTN:-}" ] || fail "found WITHOUT_NVCC and WITH_FLASH_ATTN, expected one of them: flash-attn is compiled with nvcc"
[ -n "${WITHOUT_NVCC:-}" ] || check_nvcc
export MAX_JOBS=${MAX_JOBS:-$(default_jobs)}
[[ $MAX_JOBS =~ ^[1-9][0-9]*$ ]] || fail "found MAX_JOBS=$MAX_JOBS, expected a number of compilers, 1 or more"

FINGERPRINT="$(fingerprint "${BASH_SOURCE[0]}")${WITH_FLASH_ATTN:+ flash-attn}"
has_driver && DRIVER=driver || DRIVER=no-driver
STAMPED=$(cat "$STAMP" 2>/dev/null || true)
if [ "$STAMPED" = "$FINGERPRINT driver" ] || [ "$STAMPED" = "$FINGERPRINT $DRIVER" ]; then
   echo "setup_gpu: $VENV is up to date"
   exit 0
fi

make_venv
BIN=$(cd "$VENV" && pwd)/bin
export PATH=$BIN:$PATH # ninja
PIP=("$BIN/python" -m pip --disable-pip-version-check -qq)
step "installing slime_opd, SGLang and its torch (11 GB)" "${PIP[@]}" install -e "${ROOT}[gpu,test]"
"$BIN/python" -W ignore -c 'import sys, torch; sys.exit(torch.version.cuda != sys.argv[1])' "$CUDA" ||
   fail "found $("$BIN/python" -W ignore -c 'import torch; print("torch", torch.__version__, "built for CUDA", torch.version.cuda)'), expected a build for CUDA $CUDA; use a package index with PyPI's wheels"

# The wheels of torch's CUDA libraries have their headers, except for two parts. A toolkit's headers may be of another
# version, without cuDNN and NCCL; Transformer Engine would use them, so CUDA_HOME is set to a path that does not exist.
step "installing a builder and CUDA headers" \
   "${PIP[@]}" install "setuptools>=70.1" wheel "nvidia-cuda-nvcc-cu12==$CUDA.*" "nvidia-cuda-cccl-cu12==$CUDA.*"
HEADERS=$(printf '%s:' "$BIN"/../lib/python3*/site-packages/nvidia/*/include)
step "compiling Transformer Engine for it, $MAX_JOBS at a time (some minutes)" \
   env CUDA_HOME="$BIN/no-toolkit" CPATH="$HEADERS" NVTE_PYTORCH_FORCE_BUILD=TRUE \
   "${PIP[@]}" install --no-build-isolation -e "${ROOT}[transformer-engine]"
if [ -n "${WITH_FLASH_ATTN:-}" ]; then
   step "compiling flash-attn (an hour or more)" env CUDA_HOME="$(dirname "$(dirname "$(find_nvcc)")")" \
      "${PIP[@]}" install --no-build-isolation -e "${ROOT}[flash-attn]"
fi

step "checking that the versions fit together" "$BIN/python" -m pip check
step "checking that it imports" "$BIN/python" -W ignore -c "import ${IMPORTS// /, }"
if [ "$DRIVER" = driver ]; then
   step "checking that its kernels import" "$BIN/python" -W ignore -c "import ${KERNELS// /, }${WITH_FLASH_ATTN:+, flash_attn}"
   step "checking that torch finds a GPU" "$BIN/python" -W ignore -c 'import torch; torch.zeros(1, device="cuda")'
else
   echo "setup_gpu: not checked, as this machine has no NVIDIA driver: import of $KERNELS; run this again where there is a GPU"
fi
echo "$FINGERPRINT $DRIVER" >"$STAMP"
echo "setup_gpu: done; use it with: source $VENV/bin/activate"
