"""Rows of a JSONL or Parquet file, and the values in their columns.

A file is Parquet when it begins with Parquet's magic bytes, and otherwise JSONL: one JSON
object per line, blank lines skipped. `FILE@[a:b]` reads the rows a to b as a Python slice does.
Every row remembers where it stands, so each error can name the file and the line.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_opd.errors import DataError

_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")
_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Row:
    """One row: its columns, and `where` it stands ("FILE, line 3") for messages."""

    where: str
    columns: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value under `key`; a dot reaches into a nested column (`reward_model.ground_truth`).

        A column whose own name is `key`, dots included, comes first. Raises DataError that names
        the row, the key and the keys present.
        """
        if key in self.columns:
            return self.columns[key]
        value: Any = self.columns
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise DataError(f"{self.where}: no key {key!r}; present are {_listed(self.columns, key)}")
            value = value[part]
        return value

    def has(self, key: str) -> bool:
        """Whether `get(key)` finds a value."""
        try:
            self.get(key)
        except DataError:
            return False
        return True


def read_rows(spec: str) -> list[Row]:
    """The rows of `FILE` or `FILE@[a:b]`.

    Raises DataError for a missing or empty file, a slice without rows, and any row that does
    not parse: none is skipped.
    """
    match = _SLICE.match(spec)
    path, chosen = Path(spec), slice(None)
    if match:
        path = Path(match["path"])
        chosen = slice(*(int(bound) if bound else None for bound in (match["start"], match["stop"])))
    elif spec.endswith("]") and "@[" in spec:
        raise DataError(f"{spec}: cannot read the slice; expected FILE@[start:stop] with whole numbers")
    try:
        with path.open("rb") as file:
            is_parquet = file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
        if not is_parquet and path.suffix == ".parquet":
            raise DataError(f"{path}: is named .parquet and is not Parquet; is it complete, or a Git LFS pointer?")
        rows = _parquet_rows(path, chosen) if is_parquet else _jsonl_rows(path, chosen)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{spec}: no rows")
    return rows


def _jsonl_rows(path: Path, chosen: slice) -> list[Row]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is neither Parquet nor UTF-8 text ({error.reason})") from error
    return [_jsonl_row(f"{path}, line {number}", line) for number, line in lines[chosen]]


def _jsonl_row(where: str, line: str) -> Row:
    try:
        columns = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}; correct or remove the line"
        ) from error
    if not isinstance(columns, dict):
        raise DataError(f"{where}: a JSON {type(columns).__name__}; expected one object {{...}} per line")
    return Row(where, columns)


def _parquet_rows(path: Path, chosen: slice) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: Parquet that cannot be read: {error}") from error
    start, stop, _ = chosen.indices(table.num_rows)
    rows = table.slice(start, max(stop - start, 0)).to_pylist()
    return [Row(f"{path}, row {number}", columns) for number, columns in enumerate(rows, start=start)]


def _listed(columns: Mapping[str, Any], key: str) -> str:
    """The keys of a row, one level of nesting spelled with dots, and the one most like `key`."""
    names: list[str] = []
    for name, value in columns.items():
        names.extend([f"{name}.{inner}" for inner in value] if isinstance(value, Mapping) and value else [name])
    close = difflib.get_close_matches(key, names, n=1)
    return ", ".join(names) + (f" (did you mean {close[0]!r}?)" if close else "")
