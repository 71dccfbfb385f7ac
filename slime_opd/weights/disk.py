"""Weight transport by disk: a Hugging Face directory that the engines load."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from slime_opd.config import Config
from slime_opd.engine.control import EngineControl
from slime_opd.errors import ConfigError
from slime_opd.weights.buckets import NamedTensor


class DiskTransport:
    """Writes each bucket as one safetensors file; the engines load the directory when it is complete."""

    def __init__(self, config: Config, rank: int, controls: list[EngineControl]) -> None:
        self._controls = controls
        directory, origin = config.weights.update_weight_disk_dir, config.model.hf_checkpoint
        if directory is None or origin is None:
            raise ConfigError("--update-weight-transport disk needs --update-weight-disk-dir and --hf-checkpoint")
        self._directory, self._origin = Path(directory), Path(origin)
        self._files = 0

    def send(self, bucket: list[NamedTensor]) -> None:
        """Write one bucket."""
        if self._files == 0:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(parents=True)
            for file in self._origin.glob("*.json"):
                if not file.name.endswith(".index.json"):
                    shutil.copy2(file, self._directory)
        save_file(
            {name: tensor.cpu() for name, tensor in bucket}, self._directory / f"model-{self._files:05d}.safetensors"
        )
        self._files += 1

    def finish(self, version: str) -> None:
        """Make every engine load the directory, as weights `version`."""
        self._files = 0
        for control in self._controls:
            control.update_weights_from_disk(str(self._directory.resolve()), weight_version=version)
