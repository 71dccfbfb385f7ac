"""Whether a run can write where it is to write, and whether its checkpoints fit."""

from __future__ import annotations

import errno
import os

import pytest

from slime_opd.config import parse
from slime_opd.preflight import disk
from slime_opd.preflight.findings import Findings
from slime_opd.preflight.memory_estimate import Size


def test_a_directory_that_exists_or_can_be_made_is_writable_and_stays_as_it_was(tmp_path):
    assert disk.why_not_writable(str(tmp_path)) is None
    assert disk.why_not_writable(str(tmp_path / "a/b/c")) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_a_link_to_nothing_and_a_name_that_is_none_are_not(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert disk.why_not_writable(str(tmp_path / "file")) == f"{tmp_path}/file is a file"
    assert disk.why_not_writable(str(tmp_path / "file/x/y")) == f"{tmp_path}/file is a file"
    assert disk.why_not_writable(str(tmp_path / "link/x")) == f"{tmp_path}/link is not a directory"
    assert disk.why_not_writable("x" * 5000) is not None
    assert disk.why_not_writable("a\0b") is not None


def test_a_read_only_file_system_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    assert disk.why_not_writable(str(tmp_path)) == f"no file can be made in {tmp_path} (Read-only file system)"


def test_every_directory_that_a_run_writes_to_is_checked():
    arguments = "--save /proc/a --run-dir /proc/b --update-weight-disk-dir /proc/c"
    found = Findings()
    disk.inspect_written_directories(parse(arguments.split()), found)
    assert [problem.split()[:2] for problem in found.problems] == [
        ["--save", "/proc/a"],
        ["--run-dir", "/proc/b"],
        ["--update-weight-disk-dir", "/proc/c"],
    ]


@pytest.mark.parametrize(
    ("free", "expected"),
    [(10_000, "fine"), (2_000, "lower the number with --keep-checkpoints"), (500, "there is no space for one")],
)
def test_the_checkpoints_of_a_run_need_space(tmp_path, monkeypatch, free, expected):
    # 100 parameters of 2 + 12 bytes, three times.
    size = Size(attention=100, mlp=0, shared=0, experts=0, embedding=0, layers=1, dense=1, tied=True)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    found = Findings()
    config = parse(["--save", str(tmp_path), "--keep-checkpoints", "3"])
    disk.inspect_disk(config, size, found)
    assert found.ok if expected == "fine" else expected in found.problems[0]


def test_no_space_is_not_what_a_directory_that_cannot_be_written_lacks():
    size, found = Size(1, 0, 0, 0, 0, 1, 1, True), Findings()
    disk.inspect_disk(parse(["--save", "/proc/x"]), size, found)
    assert (found.problems, found.ok) == ([], [])
