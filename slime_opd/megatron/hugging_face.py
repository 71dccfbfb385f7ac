"""Hugging Face directories: what dtype their weights have, and how a model is written as one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor

from slime_opd.errors import CheckpointError

# What makes a directory usable beside its weights.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*")


def weights_dtype(directory: str | Path) -> torch.dtype:
    """The dtype of the weights of a Hugging Face directory; CheckpointError where it has no safetensors files."""
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no .safetensors file there; expected a Hugging Face model directory")
    with safe_open(files[0], framework="pt") as weights:
        return weights.get_tensor(next(iter(weights.keys()))).dtype


def write(
    weights: Iterable[tuple[str, Tensor]], output: str | Path, origin: str | Path, *, shard_bytes: int, overwrite: bool
) -> None:
    """Write weights as safetensors shards with an index, beside the tokenizer and config of `origin`.

    Raises CheckpointError for an output that holds files, unless `overwrite`.
    """
    output, origin = Path(output), Path(origin)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(f"{output} is not empty; choose another --output-dir or say --force")
    output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu() for name, tensor in weights}
    save_torch_state_dict(state, output, max_shard_size=shard_bytes)
    for pattern in _COMPANIONS:
        for file in origin.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copy2(file, output / file.name)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = json.loads((output / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
