#!/usr/bin/env bash
# Sets up a virtual environment and passes the tests, two at a time: bash tests/run.sh [arguments of pytest]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=${VENV:-$ROOT/.venv}
bash tools/setup_cpu.sh "$VENV"
PATH=$(realpath "$VENV")/bin:$PATH
export PYTHONPATH=$ROOT PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE  # each of the many processes would compile all that it imports
exec python -m pytest -n 2 --no-loadscope-reorder "$@"
