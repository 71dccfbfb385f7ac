"""The file formats of a data set: JSONL, a JSON array, CSV and Parquet.

Each format has `len()` and `rows(start, stop)`, which yields (position in the file, columns) row by row. Only a
batch of rows is in memory, except for a JSON array, which is parsed as a whole. For any content, the only exception is
a DataError that names the position.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from slime_opd.errors import DataError

Positioned = tuple[str, Mapping[str, Any]]

_PARQUET_BATCH = 1024
_PARQUET_MAGIC = b"PAR1"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Format(Protocol):
    """A data file that is read row by row."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Iterator[Positioned]: ...


def open_file(path: Path, max_row_bytes: int) -> Format:
    """Open a data file; the format is detected from its content (CSV: from its name).

    Raises DataError for a format that cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(_LFS_POINTER):
        raise DataError(f"{path}: is a Git LFS pointer, not the data file; run `git lfs pull`")
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{path}: is compressed ({name}); decompress it first")
    if head.startswith(_PARQUET_MAGIC):
        return Parquet(path, max_row_bytes)
    if path.suffix == ".parquet":
        raise DataError(f"{path}: is named .parquet and is not Parquet; is it complete?")
    if path.suffix in _DELIMITERS:
        return Csv(path, max_row_bytes, _DELIMITERS[path.suffix])
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return JsonArray(path, max_row_bytes)
    return JsonLines(path, max_row_bytes)


class JsonLines:
    """One JSON object per line; blank lines are skipped."""

    def __init__(self, path: Path, max_row_bytes: int) -> None:
        self._path, self._max_row_bytes = path, max_row_bytes

    def __len__(self) -> int:
        return sum(1 for _ in self._lines())

    def rows(self, start: int, stop: int) -> Iterator[Positioned]:
        for number, line in islice(self._lines(), start, stop):
            where = f"{self._path}, line {number}"
            yield where, _object(where, _text(where, line))

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Line number, from 1, and bytes of each line that is not blank."""
        with self._path.open("rb") as file:
            number = 0
            # At most the limit is read, so that a file without newlines does not fill the memory.
            while line := file.readline(self._max_row_bytes + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                _check_size(f"{self._path}, line {number}", len(line), self._max_row_bytes)
                if line.strip():
                    yield number, line


class JsonArray:
    """One array of objects: `[{…}, {…}]`, on one line or many."""

    def __init__(self, path: Path, max_row_bytes: int) -> None:
        self._path, self._max_row_bytes = path, max_row_bytes
        self._rows = list(self._elements(_text(str(path), path.read_bytes().removeprefix(b"\xef\xbb\xbf"))))

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, start: int, stop: int) -> Iterator[Positioned]:
        yield from self._rows[start:stop]

    def _elements(self, text: str) -> Iterator[Positioned]:
        decoder = json.JSONDecoder()
        index, line, closing = _skip_space(text, text.index("[") + 1), 1, "]"
        counted_to = 0
        while text[index : index + 1] != closing:
            line += text.count("\n", counted_to, index)
            counted_to = index
            where = f"{self._path}, line {line}"
            element, end = _parse(where, functools.partial(decoder.raw_decode, text, index))
            _check_size(where, end - index, self._max_row_bytes)
            yield where, _checked_object(where, element)
            index = _skip_space(text, end)
            if text[index : index + 1] == ",":
                index = _skip_space(text, index + 1)
            elif text[index : index + 1] != closing:
                line += text.count("\n", counted_to, index)
                raise DataError(
                    f"{self._path}, line {line}: expected ',' or ']' after an object of the JSON array; "
                    "is the file complete?"
                )
        if rest := text[index + 1 :].strip():
            raise DataError(f"{self._path}: found {rest[:20]!r} after the end of the JSON array, expected nothing")


class Csv:
    """A header, then one row per record; all values are text."""

    def __init__(self, path: Path, max_row_bytes: int, delimiter: str) -> None:
        self._path, self._max_row_bytes, self._delimiter = path, max_row_bytes, delimiter

    def __len__(self) -> int:
        return sum(1 for _ in self._records())

    def rows(self, start: int, stop: int) -> Iterator[Positioned]:
        yield from islice(self._records(), start, stop)

    def _records(self) -> Iterator[Positioned]:
        # The default limit refuses fields above 128 KiB. The limit is global to the process, so it is set before each
        # use.
        csv.field_size_limit(self._max_row_bytes)
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=self._delimiter, strict=True)
            header: list[str] | None = None
            while True:
                where = f"{self._path}, line {reader.line_num + 1}"
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except (csv.Error, UnicodeDecodeError) as error:
                    if "field larger than" in str(error):
                        _check_size(where, self._max_row_bytes + 1, self._max_row_bytes)
                    raise DataError(f"{where}: not valid CSV in UTF-8: {error}") from error
                _check_size(where, sum(map(len, fields)), self._max_row_bytes)
                if header is None:
                    header = fields
                elif fields:
                    if len(fields) != len(header):
                        raise DataError(f"{where}: {len(fields)} fields, the header has {len(header)}")
                    yield where, dict(zip(header, fields, strict=True))


class Parquet:
    """A table; rows are counted from 0."""

    def __init__(self, path: Path, max_row_bytes: int) -> None:
        import pyarrow.parquet

        self._path, self._max_row_bytes = path, max_row_bytes
        with _parquet_errors(path):
            self._file = pyarrow.parquet.ParquetFile(path)
            footer = self._file.metadata
            in_groups = sum(footer.row_group(number).num_rows for number in range(footer.num_row_groups))
        self._count = footer.num_rows
        if self._count != in_groups or self._count < 0:
            raise DataError(
                f"{path}: Parquet that cannot be read: its footer has {self._count} rows, its row groups {in_groups}"
            )

    def __len__(self) -> int:
        return self._count

    def rows(self, start: int, stop: int) -> Iterator[Positioned]:
        first = 0
        for batch in self._batches():
            inside = range(max(start, first), min(stop, first + batch.num_rows))
            if inside:
                yield from self._rows_of(batch.slice(inside.start - first, len(inside)), inside.start)
            first += batch.num_rows
            if first >= stop:
                return
        raise DataError(f"{self._path}: Parquet that cannot be read: it ends after {first} of its {self._count} rows")

    def _batches(self) -> Iterator[Any]:
        batches = self._file.iter_batches(batch_size=_PARQUET_BATCH)
        while True:
            with _parquet_errors(self._path):
                batch = next(batches, None)
                if batch is None:
                    return
                # Offsets in a damaged file may point anywhere.
                batch.validate(full=True)
            yield batch

    def _rows_of(self, batch: Any, first: int) -> Iterator[Positioned]:
        if batch.nbytes > self._max_row_bytes:
            for number in range(batch.num_rows):
                where = f"{self._path}, row {first + number}"
                _check_size(where, batch.slice(number, 1).nbytes, self._max_row_bytes)
        with _parquet_errors(self._path):
            rows = batch.to_pylist()
        for number, columns in enumerate(rows, start=first):
            yield f"{self._path}, row {number}", columns


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Context that converts exceptions of pyarrow (its own, OSError, ValueError and others) to DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: Parquet that cannot be read: {reason}") from error


def json_kind(value: object) -> str:
    """The JSON type of a value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _object(where: str, text: str) -> Mapping[str, Any]:
    return _checked_object(where, _parse(where, functools.partial(json.loads, text)))


def _checked_object(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is {json_kind(value)}, expected one object {{...}} with a row's columns")
    return value


def _parse(where: str, parse: Callable[[], Any]) -> Any:
    """The result of `parse`; exceptions of json become DataError."""
    try:
        return parse()
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}; correct or remove the line"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON that is nested too deeply to be read; remove the row") from error
    except ValueError as error:  # a number with too many digits for Python
        raise DataError(f"{where}: JSON with a number that cannot be read: {error}") from error


def _text(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 text ({error.reason} at byte {error.start}); "
            "expected JSONL, a JSON array, CSV or Parquet"
        ) from error


def _skip_space(text: str, index: int) -> int:
    """Index of the first character at or after `index` that is not white space."""
    while index < len(text) and text[index] in " \t\r\n":
        index += 1
    return index


def _check_size(where: str, size: int, limit: int) -> None:
    if size > limit:
        raise DataError(
            f"{where}: the row has more than {limit} bytes (--max-row-bytes); remove it, or raise the limit"
        )
