"""Writes a Hugging Face directory shard by shard; an interrupted write is resumed with the first missing shard."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from slime_opd.checkpoint import disk, manifest
from slime_opd.checkpoint.atomic import replace_text
from slime_opd.checkpoint.formats.hf_reader import open_weights
from slime_opd.checkpoint.formats.tensors import checksum, own_storage
from slime_opd.checkpoint.safetensors_index import INDEX
from slime_opd.errors import CheckpointError
from slime_opd.observe.progress import Progress

# Files that are copied beside the weights: tokenizer, config, license, and a model's own code.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*")
# The shards that are complete; deleted when all are.
_JOURNAL = "conversion.partial.json"

# Shape and dtype of weights, by name.
TensorInfos = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class WeightGroup:
    """Weights that are read together, because they are made of one parameter. `read` returns them by name."""

    tensors: TensorInfos
    read: Callable[[], dict[str, Tensor]]

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())


def write(
    groups: Iterable[WeightGroup],
    output: str | Path,
    origin: str | Path,
    *,
    shard_bytes: int,
    overwrite: bool,
    source: str,
) -> list[str]:
    """Write weights as safetensors shards with an index and checksums, beside the tokenizer and config of `origin`.

    One shard is in memory at a time; it is read back and compared before it gets its name. If `output` holds an
    interrupted write of the same `source` with the same shards, it is resumed. Returns the shards that were complete
    already. Raises CheckpointError where `output` holds other files, unless `overwrite`, and where a shard differs from
    what was written.
    """
    output, origin = Path(output), Path(origin)
    shards = list(_shards(groups, shard_bytes))
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    )
    tensors = [{name: info for group in shard for name, info in group.tensors.items()} for shard in shards]
    total = sum(group.bytes for shard in shards for group in shard)
    plan = hashlib.sha256(repr((source, str(origin), tensors)).encode()).hexdigest()
    with _disk_errors(output, total):
        done = _begin(output, plan, overwrite)
        reused = [name for name in names if name in done]
        with Progress("writing", len(shards), unit="shards") as progress:
            for name, shard, expected in zip(names, shards, tensors, strict=True):
                if name not in done:
                    _write_shard(output / name, shard, expected)
                    done[name] = manifest.sha256(output / name)
                    replace_text(output / _JOURNAL, json.dumps({"plan": plan, "done": done}))
                progress.advance(1)
        if len(shards) > 1:
            weight_map = {tensor: name for name, in_shard in zip(names, tensors, strict=True) for tensor in in_shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            replace_text(output / INDEX, json.dumps(index, indent=2) + "\n")
        _copy_companions(origin, output, next(iter(tensors[0].values()))[1])
        manifest.write(output, manifest.measure(output, manifest.listed_files(output, [_JOURNAL])))
        (output / _JOURNAL).unlink()
        return reused


@contextmanager
def _disk_errors(output: Path, needed: int) -> Iterator[None]:
    """Turn the error of a full or read-only disk into a CheckpointError; complete shards stay for the next attempt."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = re.search(
            r"No space left on device|Disk quota exceeded|Read-only file system|Permission denied", str(error)
        )
        if reason is None:
            raise
        existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        free = disk.format_bytes(shutil.disk_usage(existing).free)
        raise CheckpointError(
            f"{output} was not written: {reason[0]} (it needs about {disk.format_bytes(needed)}, {free} are free); once this is mended, the same command continues with the first shard that is missing"
        ) from error


def _begin(output: Path, plan: str, overwrite: bool) -> dict[str, str]:
    """Prepare the output directory; returns checksums by name of the shards that an interrupted write completed."""
    journal = output / _JOURNAL
    if output.is_dir() and any(output.iterdir()):
        earlier = json.loads(journal.read_text()) if journal.is_file() else {}
        if earlier.get("plan") == plan:
            return {
                name: sha256
                for name, sha256 in earlier["done"].items()
                if (output / name).is_file() and manifest.sha256(output / name) == sha256
            }
        if not overwrite:
            raise CheckpointError(f"{output} is not empty; choose another --output-dir or add --force")
        stale = [*output.glob("*.safetensors"), *output.glob("*.partial"), output / INDEX, output / manifest.MANIFEST]
        for path in stale:
            path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    replace_text(journal, json.dumps({"plan": plan, "done": {}}))
    return {}


def _write_shard(path: Path, shard: list[WeightGroup], expected: TensorInfos) -> None:
    # A slice of a larger tensor would keep all of it in memory.
    state = {name: own_storage(weight) for group in shard for name, weight in group.read().items()}
    checksums = {name: checksum(weight) for name, weight in state.items()}
    partial = path.with_name(f"{path.name}.partial")
    save_file(state, partial, metadata={"format": "pt"})
    state.clear()
    with open_weights(partial) as written:
        names = set(written.keys())
        for name, (shape, dtype) in expected.items():
            weight = written.get_tensor(name) if name in names else None
            if weight is None or tuple(weight.shape) != shape or weight.dtype is not dtype:
                raise CheckpointError(f"{path}: {name} is not there as {list(shape)} of {dtype}")
            if checksum(weight) != checksums[name]:
                raise CheckpointError(f"{path}: {name} is not what was written; is the disk sound?")
    partial.replace(path)


def _shards(groups: Iterable[WeightGroup], shard_bytes: int) -> Iterator[list[WeightGroup]]:
    shard: list[WeightGroup] = []
    size = 0
    for group in groups:
        if shard and size + group.bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += group.bytes
    yield shard


def _copy_companions(origin: Path, output: Path, dtype: torch.dtype) -> None:
    for pattern in _COMPANIONS:
        for file in origin.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copy2(file, output / file.name)
    config = json.loads((output / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    # It describes the original's weights; these are not quantised.
    config.pop("quantization_config", None)
    replace_text(output / "config.json", json.dumps(config, indent=2) + "\n")
