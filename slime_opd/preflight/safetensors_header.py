"""The header of a safetensors file: the name, dtype and shape of each tensor, read without the tensors.

The format (github.com/huggingface/safetensors): 8 bytes, the header's length N as a little-endian unsigned integer; N
bytes of JSON; then the tensors' bytes, one after the other without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_opd.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `dtype` is safetensors' name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name.

    Raises CheckpointError, with the file, where it cannot be read, is truncated, or is not a safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            if length is None:
                raise _damaged(file, f"it has {size} bytes")
            if length > MAX_HEADER_BYTES or length < 2:
                raise _damaged(file, "it does not start with a header")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(text) < length:
        raise _damaged(
            file, f"its header has {length} bytes, and only {len(text)} are there: is its download complete?"
        )
    return _tensors_of(file, text, data_bytes=size - 8 - length)


def _tensors_of(file: Path, text: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise _damaged(file, "its header is not JSON") from None
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise _damaged(file, "its header is not a JSON object")
    _check_metadata(file, header.pop("__metadata__", None))
    tensors, extents = {}, []
    for name, entry in header.items():
        info, begin, end = _tensor_of(file, name, entry)
        tensors[name] = info
        extents.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(extents):
        if begin != position:
            raise _damaged(file, f"{printable(name)} starts at byte {begin} of the data, expected {position}")
        position = end
    if data_bytes < position:
        raise CheckpointError(
            f"{file} is truncated: its header describes {position:,} bytes of tensors, and {data_bytes:,} are there; is its download complete?"
        )
    if data_bytes > position:
        raise _damaged(file, f"{data_bytes - position:,} bytes follow its last tensor")
    return tensors


def _check_metadata(file: Path, metadata: Any) -> None:
    is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not is_text:
        raise _damaged(file, "its __metadata__ is not an object of strings")


def _tensor_of(file: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(file, f"{printable(name)} has no dtype, shape and data_offsets") from None
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _damaged(file, f"{printable(name)} has a shape or an offset that is not a number of elements or bytes")
    bits = _bits(dtype)
    if bits is None:
        raise CheckpointError(f"{file}: {printable(name)} is of the unknown dtype {printable(dtype)}")
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise _damaged(
            file, f"{printable(name)} has {end - begin} bytes, which are not a {dtype} tensor of shape {shape}"
        )
    return TensorInfo(dtype, tuple(shape)), begin, end


# Of the dtypes that the safetensors library knows; one that is not here is refused by it as well.
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64,
    "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def _bits(dtype: Any) -> int | None:
    return _BITS.get(dtype) if isinstance(dtype, str) else None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a whole safetensors file: {reason}")


def printable(value: Any) -> str:
    """A name from a damaged file, safe to print on one line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return (text if len(text) <= 80 else f"{text[:77]}...").encode("unicode_escape").decode("ascii")
