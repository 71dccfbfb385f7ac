"""Rows of a data file, and the values in their columns.

`FILE` is JSONL, a JSON array of objects, CSV or Parquet (see formats.py). `FILE@[a:b]` is a Python slice of it.
Every row has its position, so that errors can name the file and the line.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_opd.data.formats import open_file
from slime_opd.errors import DataError

_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d{0,18}):(?P<stop>-?\d{0,18})\]$", re.DOTALL)
_KEYS_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One row: its columns, and `where`, its position for messages ("FILE, line 3")."""

    where: str
    columns: Mapping[str, Any]

    def get(self, key: str, flag: str | None = None) -> Any:
        """The value under `key`; a dot selects from a nested column (`reward_model.ground_truth`).

        A column with the full name `key`, dots included, takes precedence. Raises DataError, which names the row, the
        key, the `flag` that sets it, and the existing keys.
        """
        if key in self.columns:
            return self.columns[key]
        value: Any = self.columns
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                name = f"{key!r} ({flag})" if flag else repr(key)
                raise DataError(f"{self.where}: no key {name}; present are {_key_list(self.columns, key)}")
            value = value[part]
        return value

    def has(self, key: str) -> bool:
        """Whether `get(key)` succeeds."""
        try:
            self.get(key)
        except DataError:
            return False
        return True


class RowReader:
    """The rows of `FILE` or `FILE@[a:b]`. `len()` is their number; iteration reads them one by one."""

    def __init__(self, spec: str, max_row_bytes: int = 16 * 2**20) -> None:
        """Count the rows. Raises DataError for a file that cannot be read, an empty file, or an empty slice."""
        self._path, selection = _split(spec)
        with self._os_errors():
            if self._path.is_dir():
                raise DataError(f"{self._path}: is a directory, expected a file")
            self._file = open_file(self._path, min(max_row_bytes, sys.maxsize - 1))
            total = len(self._file)
        self._start, self._stop, _ = selection.indices(total)
        if self._start >= self._stop:
            raise DataError(f"{spec}: no rows: the file has {total}" if total else f"{self._path}: no rows in the file")

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError for a row that cannot be read; no row is skipped."""
        with self._os_errors():
            for where, columns in self._file.rows(self._start, self._stop):
                yield Row(where, columns)

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror or error}") from error


def _split(spec: str) -> tuple[Path, slice]:
    match = _SLICE.match(spec)
    if match:
        bounds = (int(bound) if bound.strip("-") else None for bound in (match["start"], match["stop"]))
        return Path(match["path"]), slice(*bounds)
    if spec.endswith("]") and "@[" in spec:
        raise DataError(f"{spec}: cannot parse the slice; expected FILE@[start:stop] with integers")
    return Path(spec), slice(None)


def _key_list(columns: Mapping[str, Any], key: str) -> str:
    """The keys of a row as text, nested keys of one level with dots, and the key that is most similar to `key`."""
    names: list[str] = []
    for name, value in columns.items():
        names.extend([f"{name}.{inner}" for inner in value] if isinstance(value, Mapping) and value else [name])
    close = difflib.get_close_matches(key, names, n=1)
    # A name may contain newlines or other characters that a terminal cannot print.
    shown = {name: name if name.isprintable() else ascii(name) for name in (*names[:_KEYS_SHOWN], *close)}
    listed = ", ".join(shown[name] for name in names[:_KEYS_SHOWN]) or "none"
    more = f" and {len(names) - _KEYS_SHOWN} more" if len(names) > _KEYS_SHOWN else ""
    return f"{listed}{more}" + (f" (did you mean '{shown[close[0]]}'?)" if close else "")
