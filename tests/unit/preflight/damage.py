"""Ways to damage a Hugging Face directory, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def edit_config(directory: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(directory: Path, change) -> None:
    """Save what `change` makes of the weights, a dict of tensors by name."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def truncate(directory: Path, keep: float = 0.5) -> None:
    """Keep the first part of model.safetensors."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def split_in_two(directory: Path) -> dict[str, str]:
    """Two shards and an index in place of one file; returns the index's weight_map."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: weights[name] for name in own}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in shards.items() for name in own}
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    """model.safetensors.index.json with a weight_map."""
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
