"""`manifest.sha256`: the checksum and size of every file of a checkpoint, as `sha256sum --check` reads them.

    # files 2
    # bytes 417  common.pt
    8f43…  common.pt
    # bytes 16777216  __0_0.distcp
    02c1…  __0_0.distcp

Lines that start with `#` are comments to sha256sum. They hold the sizes, which the quick check compares without reading
a file, and the number of files, which shows whether the manifest was truncated. Manifests of older versions have
checksums alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from slime_opd.checkpoint.location import TOKENIZER
from slime_opd.errors import CheckpointError

MANIFEST = "manifest.sha256"
# More threads do not read faster from one file system.
_MAX_THREADS = 8


@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint: name relative to the directory, checksum, and size in bytes (None: not recorded)."""

    name: str
    sha256: str
    size: int | None


def listed_files(directory: Path, ignored: Iterable[str] = ()) -> list[str]:
    """Names of the files that belong in a manifest: those of the directory itself and of its tokenizer."""
    skipped = {MANIFEST, *ignored}
    paths = [path for pattern in ("*", f"{TOKENIZER}/*") for path in directory.glob(pattern) if path.is_file()]
    names = [path.relative_to(directory).as_posix() for path in paths]
    return sorted(name for name in names if name not in skipped and not name.endswith(".partial"))


def share_of(names: Sequence[str], sizes: Sequence[int], rank: int, world_size: int) -> list[str]:
    """The files that one of `world_size` ranks reads, so that each reads about the same number of bytes."""
    loads = [0] * world_size
    shares: list[list[str]] = [[] for _ in range(world_size)]
    for size, name in sorted(zip(sizes, names, strict=True), key=lambda pair: (-pair[0], pair[1])):
        lightest = loads.index(min(loads))
        loads[lightest] += size
        shares[lightest].append(name)
    return shares[rank]


def measure(directory: Path, names: Sequence[str], threads: int | None = None) -> list[Entry]:
    """Read the files and compute their entries, several files at a time (hashlib releases the GIL)."""
    workers = threads or min(_MAX_THREADS, os.cpu_count() or 1)

    def entry(name: str) -> Entry:
        path = directory / name
        return Entry(name, sha256(path), path.stat().st_size)

    with ThreadPoolExecutor(max_workers=max(1, min(workers, len(names)))) as pool:
        return list(pool.map(entry, names))


def write(directory: Path, entries: Sequence[Entry]) -> None:
    """Write the manifest of a directory, whole or not at all."""
    lines = [f"# files {len(entries)}"]
    for entry in sorted(entries, key=lambda entry: entry.name):
        lines += [f"# bytes {entry.size}  {entry.name}", f"{entry.sha256}  {entry.name}"]
    partial = directory / f"{MANIFEST}.partial"
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(directory / MANIFEST)


def read(directory: Path) -> list[Entry] | None:
    """The entries of a directory's manifest; None where there is none. Raises CheckpointError where it is damaged."""
    path = directory / MANIFEST
    try:
        # Not splitlines: other characters than a newline would end a line there.
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error})") from error
    entries: list[Entry] = []
    sizes: dict[str, int] = {}
    count: int | None = None
    for number, line in enumerate(lines, 1):
        if match := re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line):
            entries.append(Entry(match[2], match[1], sizes.get(match[2])))
        elif match := re.fullmatch(r"# bytes (\d{1,18})  (\S.*)", line):
            sizes[match[2]] = int(match[1])
        elif match := re.fullmatch(r"# files (\d{1,9})", line):
            count = int(match[1])
        else:
            raise CheckpointError(f"{MANIFEST} is damaged: line {number} is neither a checksum nor a size")
    is_sized = bool(sizes) or count is not None
    if not entries or (is_sized and (count != len(entries) or sizes.keys() != {entry.name for entry in entries})):
        raise CheckpointError(
            f"{MANIFEST} is damaged: it has the checksums of {len(entries)} files and the sizes of {len(sizes)}, expected {count or 'some'} of both"
        )
    if escaping := [entry.name for entry in entries if entry.name.startswith("/") or ".." in entry.name.split("/")]:
        raise CheckpointError(f"{MANIFEST} lists {escaping[0]}, which is outside of the directory")
    return entries


def size_problems(directory: Path, entries: Iterable[Entry]) -> list[str]:
    """Files that are missing or have another size; reads no file."""
    problems = []
    for entry in entries:
        path = directory / entry.name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            problems.append(f"{entry.name} cannot be read ({error.strerror})")
            continue
        if size is None:
            problems.append(f"{entry.name} is missing")
        elif entry.size not in (None, size):
            problems.append(f"{entry.name} has {size:,} bytes, {MANIFEST} records {entry.size:,}")
    return problems


def content_problems(directory: Path, entries: Sequence[Entry], threads: int | None = None) -> list[str]:
    """Files that are missing, have another size, or whose contents differ from their checksum; reads every file."""
    problems = size_problems(directory, entries)
    if problems:
        return problems
    try:
        actual = measure(directory, [entry.name for entry in entries], threads)
    except OSError as error:
        return [f"{error.filename or directory} cannot be read ({error.strerror})"]
    return [
        f"{entry.name} is damaged: its contents differ from their checksum in {MANIFEST}"
        for entry, now in zip(entries, actual, strict=True)
        if entry.sha256 != now.sha256
    ]


def sha256(path: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
