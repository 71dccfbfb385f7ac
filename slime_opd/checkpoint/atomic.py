"""Files and directories that appear under their name only when they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from slime_opd.checkpoint.manifest import MANIFEST


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a reader finds the old text or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def replace_directory(path: str | Path, make: Callable[[Path], object]) -> Path:
    """Let `make` fill PATH.partial, then rename it to PATH. Returns PATH.

    If PATH exists and has the same manifest, the old directory stays; if it differs, the old one is renamed to
    PATH.aside_N.
    """
    final = Path(path)
    partial = final.with_name(f"{final.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    # A leftover of an interrupted call may be of a training step that was done again since.
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    if final.exists():
        old, new = final / MANIFEST, partial / MANIFEST
        if old.is_file() and old.read_bytes() == new.read_bytes():
            shutil.rmtree(partial)
            return final
        number = 1
        while (aside := final.with_name(f"{final.name}.aside_{number}")).exists():
            number += 1
        final.rename(aside)
    return partial.rename(final)
