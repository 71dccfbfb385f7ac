"""Hugging Face directories: reading their weights one at a time, and writing them shard by shard."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from mbridge.core.bridge import Bridge
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from slime_opd.checkpoint import disk, manifest
from slime_opd.errors import CheckpointError
from slime_opd.observe.progress import Progress

# What makes a directory usable beside its weights.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*")
INDEX = "model.safetensors.index.json"
# What is done of a directory that is being written; it goes when all is done.
_JOURNAL = "conversion.partial.json"


@dataclass(frozen=True)
class Group:
    """Weights that are read together: shape and dtype of each by name, and how to read them."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    read: Callable[[], dict[str, Tensor]]

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())


def checksum(values: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(values.contiguous().flatten().view(torch.uint8).numpy())


def weights_dtype(directory: str | Path) -> torch.dtype:
    """The dtype of a Hugging Face directory's weights; bfloat16 for those in fp8, which are read so.

    Raises CheckpointError where it has no safetensors files.
    """
    with _opened(weight_files(directory)[0]) as weights:
        dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


class Weights:
    """The weights of a Hugging Face directory, read one at a time through the family's bridge."""

    def __init__(self, directory: str, bridge: Bridge) -> None:
        self._directory = directory
        weight_files(directory)
        self._reader = bridge._get_safetensor_io(directory)
        self.names = set(self._reader.load_hf_weight_names())

    def read(self, name: str) -> Tensor:
        """One weight."""
        return self._reader.load_one_hf_weight(name)

    def read_several(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights by name; each file is opened once."""
        return self._reader.load_some_hf_weight(list(names))

    def check_used(self, used: set[str], hf_config: PretrainedConfig) -> None:
        """Raise CheckpointError where a weight is not there, or one that is there would be lost."""
        if missing := sorted(used - self.names):
            raise CheckpointError(
                f"--hf-checkpoint {self._directory} lacks {len(missing)} of the weights that its config.json describes, first {missing[0]}"
            )
        lost = sorted(name for name in self.names - used if not _may_stay_behind(name, hf_config))
        if lost:
            raise CheckpointError(
                f"--hf-checkpoint {self._directory} has {len(lost)} weights that the model has no place for, first {lost[0]}: is config.json of these weights?"
            )


def is_multi_token_prediction(name: str, hf_config: PretrainedConfig) -> bool:
    """Whether a weight belongs to layers that predict further tokens, which are not trained here."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return ".mtp" in name or (layer is not None and int(layer[1]) >= hf_config.num_hidden_layers)


def _may_stay_behind(name: str, hf_config: PretrainedConfig) -> bool:
    of_tied = name == "lm_head.weight" and hf_config.tie_word_embeddings
    return of_tied or name.endswith(("_scale_inv", "rotary_emb.inv_freq")) or is_multi_token_prediction(name, hf_config)


def untrained(origin: str, trained: Iterable[Group], hf_config: PretrainedConfig) -> list[Group]:
    """The weights of `origin` that training leaves alone, to be copied: layers for multi-token prediction.

    Raises CheckpointError where `origin` is of another model than `trained`. Weights in fp8 are not copied beside those that are not.
    """
    made = {name: shape for group in trained for name, (shape, _) in group.tensors.items()}
    found, copied = {}, []
    for file in sorted(Path(origin).glob("*.safetensors")):
        with _opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                part = weights.get_slice(name)
                found[name] = tuple(part.get_shape())
                if is_multi_token_prediction(name, hf_config) and not getattr(hf_config, "quantization_config", None):
                    dtype = weights.get_tensor(name).dtype
                    copied.append(Group({name: (found[name], dtype)}, _copying(file, name)))
    problems = [
        f"{name} is {list(found[name])} there and {list(made[name])} in the checkpoint"
        for name in made
        if name in found and found[name] != made[name]
    ]
    problems += [f"the checkpoint lacks {n}" for n in found if n not in made and not _may_stay_behind(n, hf_config)]
    if problems:
        raise CheckpointError(
            f"--origin-hf-dir {origin} is of another model: {'; '.join(problems[:3])} ({len(problems)} differences)"
        )
    return copied


def _copying(file: Path, name: str) -> Callable[[], dict[str, Tensor]]:
    def read() -> dict[str, Tensor]:
        with _opened(file) as weights:
            return {name: weights.get_tensor(name)}

    return read


def write(
    groups: Iterable[Group], output: str | Path, origin: str | Path, *, shard_bytes: int, overwrite: bool, source: str
) -> list[str]:
    """Write weights as safetensors shards with an index and checksums, beside the tokenizer and config of `origin`.

    One shard is in memory at a time; it is read again and compared before it takes its name. A directory in which the same conversion
    (of `source`, with the same shards) stopped is gone on with; returns the shards that were there already. Raises CheckpointError for
    another output that holds files, unless `overwrite`, and where a shard is not what was written.
    """
    output, origin = Path(output), Path(origin)
    shards = list(_shards(groups, shard_bytes))
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    )
    tensors = [{name: value for group in shard for name, value in group.tensors.items()} for shard in shards]
    plan = hashlib.sha256(repr((source, str(origin), tensors)).encode()).hexdigest()
    with _room_for(output, sum(group.bytes for shard in shards for group in shard)):
        done = _begin(output, plan, overwrite)
        with Progress("writing", len(shards), unit="shards") as progress:
            for name, shard, wanted in zip(names, shards, tensors, strict=True):
                if name not in done:
                    _write_shard(output / name, shard, wanted)
                    done[name] = manifest.sha256(output / name)
                    _replace(output / _JOURNAL, json.dumps({"plan": plan, "done": done}))
                progress.advance(1)
        if len(shards) > 1:
            total = sum(group.bytes for shard in shards for group in shard)
            weight_map = {tensor: name for name, of_shard in zip(names, tensors, strict=True) for tensor in of_shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _replace(output / INDEX, json.dumps(index, indent=2) + "\n")
        _copy_companions(origin, output, next(iter(tensors[0].values()))[1])
        manifest.write(output, manifest.measure(output, manifest.listed_files(output, [_JOURNAL])))
        (output / _JOURNAL).unlink()
        return [name for name in names if name in done.reused]


@contextmanager
def _room_for(output: Path, needed: int) -> Iterator[None]:
    """Turn a disk that is full or read-only into a CheckpointError; what is complete stays for the next attempt."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = re.search(
            r"No space left on device|Disk quota exceeded|Read-only file system|Permission denied", str(error)
        )
        if reason is None:
            raise
        there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        free = disk.format_bytes(shutil.disk_usage(there).free)
        raise CheckpointError(
            f"{output} was not written: {reason[0]} (all of it takes about {disk.format_bytes(needed)}, {free} are free); once this is mended, the same command continues with the first shard that is missing"
        ) from error


class _Done(dict[str, str]):
    """Checksums of shards by name; `reused` are those of an earlier run."""

    reused: frozenset[str] = frozenset()


def _begin(output: Path, plan: str, overwrite: bool) -> _Done:
    done, journal = _Done(), output / _JOURNAL
    if output.is_dir() and any(output.iterdir()):
        earlier = json.loads(journal.read_text()) if journal.is_file() else {}
        if earlier.get("plan") == plan:
            done.update(
                {
                    n: s
                    for n, s in earlier["done"].items()
                    if (output / n).is_file() and manifest.sha256(output / n) == s
                }
            )
            done.reused = frozenset(done)
            return done
        if not overwrite:
            raise CheckpointError(f"{output} is not empty; choose another --output-dir or say --force")
        for stale in [
            *output.glob("*.safetensors"),
            *output.glob("*.partial"),
            output / INDEX,
            output / manifest.MANIFEST,
        ]:
            stale.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    _replace(journal, json.dumps({"plan": plan, "done": {}}))
    return done


def _write_shard(path: Path, shard: list[Group], wanted: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    state: dict[str, Tensor] = {}
    for group in shard:
        for name, values in group.read().items():
            # A part of a larger tensor would hold all of it in memory.
            owns = values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
            state[name] = values if owns else values.clone(memory_format=torch.contiguous_format)
    checksums = {name: checksum(values) for name, values in state.items()}
    partial = path.with_name(f"{path.name}.partial")
    save_file(state, partial, metadata={"format": "pt"})
    state.clear()
    with _opened(partial) as written:
        there = set(written.keys())
        for name, (shape, dtype) in wanted.items():
            values = written.get_tensor(name) if name in there else None
            if values is None or tuple(values.shape) != shape or values.dtype is not dtype:
                raise CheckpointError(f"{path}: {name} is not there as {list(shape)} of {dtype}")
            if checksum(values) != checksums[name]:
                raise CheckpointError(f"{path}: {name} is not what was written; is the disk sound?")
    partial.replace(path)


def _shards(groups: Iterable[Group], shard_bytes: int) -> Iterator[list[Group]]:
    shard: list[Group] = []
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
    # Of the original's weights, where those were in fp8; these are not.
    config.pop("quantization_config", None)
    _replace(output / "config.json", json.dumps(config, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory. Raises CheckpointError where there are none: pickles (.bin) are not read."""
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no .safetensors file there; expected a Hugging Face model directory")
    return files


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): is its download complete?") from error
