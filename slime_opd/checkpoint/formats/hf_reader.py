"""Reads the weights of a Hugging Face directory, one or a few at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slime_opd.checkpoint.safetensors_index import read_index
from slime_opd.errors import CheckpointError

# Suffix of the scales of an fp8 weight.
SCALES = "_scale_inv"


class WeightReader:
    """The weights of a Hugging Face directory, by name.

    fp8 weights are read as bfloat16, multiplied by the scales of their blocks.

    Raises CheckpointError where the directory has no safetensors files, or a file cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._file_of: dict[str, str] = read_index(self._directory) or {
            name: file.name for file in weight_files(directory) for name in _keys(file)
        }

    @property
    def names(self) -> set[str]:
        """Names of all weights."""
        return set(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file, names in self._by_file(self._file_of).items():
            with open_weights(file) as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in names}
        return shapes

    def read(self, name: str) -> Tensor:
        """One weight."""
        return self.read_several([name])[name]

    def read_several(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights by name; each file is opened once."""
        weights = self._read(names)
        in_fp8 = [name for name, weight in weights.items() if _is_fp8(weight.dtype)]
        scales = self._read(f"{name}{SCALES}" for name in in_fp8)
        return weights | {name: dequantize(weights[name], scales[f"{name}{SCALES}"]) for name in in_fp8}

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for file, in_file in self._by_file(names).items():
            with open_weights(file) as opened:
                weights |= {name: opened.get_tensor(name) for name in in_file}
        return weights

    def _by_file(self, names: Iterable[str]) -> Mapping[Path, list[str]]:
        files: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            if name not in self._file_of:
                raise CheckpointError(f"{self._directory} has no weight {name}: is its download complete?")
            files[self._directory / self._file_of[name]].append(name)
        return files


def dequantize(weight: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """fp8 [M, N] and float32 scales [ceil(M/block), ceil(N/block)] -> bfloat16 [M, N].

    DeepSeek-V3 (arXiv 2412.19437), section 3.3.2: one scale for each block of 128 rows and 128 columns.
    """
    rows, columns = weight.shape
    scales = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (weight.float() * scales).bfloat16()


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory.

    Raises CheckpointError where there are none: pickles (.bin) are not read.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no .safetensors file there; expected a Hugging Face model directory")
    return files


def weights_dtype(directory: str | Path) -> torch.dtype:
    """The dtype that the weights of a Hugging Face directory are read in, judged by its first weight."""
    file = weight_files(directory)[0]
    with open_weights(file) as weights:
        dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return torch.bfloat16 if _is_fp8(dtype) else dtype


def _is_fp8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _keys(file: Path) -> list[str]:
    with open_weights(file) as weights:
        return list(weights.keys())


def open_weights(file: Path) -> safe_open:
    """Open a safetensors file as a context manager. Raises CheckpointError where it is damaged or missing."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): is its download complete?") from error
