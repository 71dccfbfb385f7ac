"""manifest.sha256: its entries, its use with sha256sum, and the damage to files or to itself that it detects."""

from __future__ import annotations

import subprocess

import pytest

from slime_opd.checkpoint import manifest
from slime_opd.checkpoint.manifest import MANIFEST, content_problems, measure, read, share_of, size_problems
from slime_opd.errors import CheckpointError


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    files = {"a.distcp": b"a" * 1000, "empty": b"", "tokenizer/tokenizer.json": b"{}", "with space.txt": b"x"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "half.partial").write_bytes(b"not listed")
    manifest.write(tmp_path, measure(tmp_path, manifest.listed_files(tmp_path)))
    return tmp_path


def test_sha256sum_reads_a_manifest_with_sizes(directory):
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", MANIFEST], cwd=directory, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0 and check.stdout.count(": OK") == 4 and check.stderr == ""
    assert {entry.name: entry.size for entry in read(directory)} == {
        "a.distcp": 1000, "empty": 0, "tokenizer/tokenizer.json": 2, "with space.txt": 1
    }  # fmt: skip
    assert content_problems(directory, read(directory)) == []


def test_a_directory_without_a_manifest_has_no_entries(tmp_path):
    assert read(tmp_path) is None


def test_a_manifest_of_an_older_version_has_no_sizes(directory):
    lines = [line for line in (directory / MANIFEST).read_text().splitlines() if not line.startswith("#")]
    (directory / MANIFEST).write_text("\n".join(lines) + "\n")
    assert {entry.size for entry in read(directory)} == {None}
    assert content_problems(directory, read(directory)) == []
    (directory / "a.distcp").write_bytes(b"b" * 1000)
    assert content_problems(directory, read(directory)) == [f"a.distcp is damaged: its contents differ from their checksum in {MANIFEST}"]  # fmt: skip


def test_sizes_show_missing_and_truncated_files_and_checksums_show_changed_contents(directory):
    entries = read(directory)
    (directory / "a.distcp").write_bytes(b"a" * 999 + b"b")
    assert size_problems(directory, entries) == []
    assert content_problems(directory, entries) == [f"a.distcp is damaged: its contents differ from their checksum in {MANIFEST}"]  # fmt: skip
    (directory / "a.distcp").write_bytes(b"a" * 999)
    (directory / "empty").unlink()
    assert size_problems(directory, entries) == [
        f"a.distcp has 999 bytes, {MANIFEST} records 1,000",
        "empty is missing",
    ]


def test_a_changed_byte_and_a_missing_line_of_a_manifest_are_detected(directory):
    whole = (directory / MANIFEST).read_bytes()

    def is_noticed(content: bytes) -> bool:
        (directory / MANIFEST).write_bytes(content)
        try:
            entries = read(directory)
        except CheckpointError:
            return True
        return bool(content_problems(directory, entries))

    assert not is_noticed(whole)
    changed = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole) - 1)]
    assert [at for at, content in enumerate(changed) if not is_noticed(content)] == []
    cut = [at for at, byte in enumerate(whole[:-1]) if byte == ord("\n")]
    assert [at for at in [0, *cut] if not is_noticed(whole[: at + 1])] == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "tokenizer/../../outside"])
def test_a_file_outside_of_the_directory_is_refused(tmp_path, name):
    (tmp_path / MANIFEST).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="is outside of the directory"):
        read(tmp_path)


def test_ranks_share_the_bytes_and_miss_no_file():
    names, sizes = [f"file{n}" for n in range(7)], [100, 60, 50, 40, 30, 20, 0]
    shares = [share_of(names, sizes, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == names
    loads = [sum(sizes[names.index(name)] for name in share) for share in shares]
    assert max(loads) <= 110 and min(loads) >= 90
    assert share_of(["one"], [5], 1, 2) == []
