"""A directory gets its final name only when it is complete, and no existing one is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_opd.checkpoint import manifest
from slime_opd.checkpoint.atomic import replace_directory


def maker(text: str):
    def make(partial: Path) -> None:
        partial.mkdir()
        (partial / "weights").write_text(text)
        manifest.write(partial, manifest.measure(partial, ["weights"]))

    return make


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_interrupted_directory_has_no_final_name_and_is_written_again(tmp_path):
    def killed(partial: Path) -> None:
        maker("half")(partial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_directory(tmp_path / "hf", killed)
    assert names(tmp_path) == ["hf.partial"]
    replace_directory(tmp_path / "hf", maker("whole"))
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / "weights").read_text() == "whole"


def test_an_equal_directory_is_not_replaced_and_a_different_old_one_is_moved_aside(tmp_path):
    for text in ("first", "first", "second", "third"):
        replace_directory(tmp_path / "hf", maker(text))
    assert names(tmp_path) == ["hf", "hf.aside_1", "hf.aside_2"]
    kept = [(tmp_path / name / "weights").read_text() for name in names(tmp_path)]
    assert kept == ["third", "first", "second"]
