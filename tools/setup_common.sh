# shellcheck shell=bash
# Shared functions of tools/setup_cpu.sh and tools/setup_gpu.sh. Sourced by both, after they set
# NAME (of the script), ROOT, VENV, PYTHON, NEEDED_GB and STAMP.

fail() {
   echo "$NAME: error: $*" >&2
   exit 1
}

step() { # description, command…
   echo "$NAME: $1"
   shift
   "$@" || fail "'$*' failed; see its output above (is the package index reachable?)"
}

check_python() { # accepted versions as text, the same as an expression over sys.version_info
   command -v "$PYTHON" >/dev/null || fail "found no $PYTHON, expected Python $1; set PYTHON=… to one"
   "$PYTHON" -c "import sys; sys.exit(not ($2))" ||
      fail "found $("$PYTHON" --version 2>&1) at $(command -v "$PYTHON"), expected $1; set PYTHON=… to one"
}

fingerprint() { # files… : changes when one of them, the interpreter or the project's directory changes
   { cat "$ROOT/setup.py" "$ROOT/tools/setup_common.sh" "$@"; echo "$ROOT"; "$PYTHON" --version; } | sha256sum | cut -d' ' -f1
}

make_venv() {
   [ -x "$VENV/bin/python" ] && return
   mkdir -p "$VENV" || fail "cannot make the directory $VENV"
   local free_gb
   free_gb=$(($(df -Pk "$VENV" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
   [ "$free_gb" -ge "$NEEDED_GB" ] || fail "found $free_gb GB free for $VENV, expected at least $NEEDED_GB"
   step "making $VENV" "$PYTHON" -m venv "$VENV"
}
