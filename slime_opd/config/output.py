"""Text that a command prints before it leaves."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

# Exit codes of a process that ended by a signal, as a shell reports them.
INTERRUPTED = 128 + 2
BROKEN_PIPE = 128 + 13

# Longer lines are hard to read on a wide screen.
_WIDEST = 160


def print_text(text: str) -> None:
    """Print; where the reader has gone (`… | head`) leave the process without a traceback, as other programs do."""
    try:
        # A path or a value may have what the terminal's encoding lacks.
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        # What is still in the buffer would raise again when Python closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE) from None


def terminal_width(stream: TextIO) -> int | None:
    """Columns to wrap at; None where `stream` is no terminal: lines of a file stay whole, to be searched."""
    return min(shutil.get_terminal_size().columns, _WIDEST) if stream.isatty() else None
