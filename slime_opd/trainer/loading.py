"""Loading a trainer's models. Checkpoints are verified first; of frozen models a copy of the weights is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from slime_opd.checkpoint import directory
from slime_opd.checkpoint.formats.load import load_weights
from slime_opd.checkpoint.formats.verification import Verification
from slime_opd.config.training_stages import CheckpointConfig
from slime_opd.errors import CheckpointError
from slime_opd.model.hidden_states import HiddenStatesModel
from slime_opd.model.vocabulary import is_padding
from slime_opd.trainer.snapshots import WeightSnapshots, fingerprint

if TYPE_CHECKING:
    from mbridge.core.bridge import Bridge

Fingerprint = tuple[float, float]


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the flag that names it."""

    location: directory.Location
    flag: str

    def __str__(self) -> str:
        return f"{self.flag} {self.location.directory}"


def student_source(options: CheckpointConfig, hf_checkpoint: str | None) -> Source:
    """The checkpoint that training starts from: --load where it holds one, else --ref-load, else --hf-checkpoint."""
    location = directory.find(options.load, options.ckpt_step) if options.load else None
    if location is not None:
        return Source(location, "--load")
    if options.ref_load:
        return Source(directory.require(options.ref_load, "--ref-load", options.ref_ckpt_step), "--ref-load")
    return Source(directory.require(hf_checkpoint, "--hf-checkpoint"), "--hf-checkpoint")


class ModelLoader:
    """Loads checkpoints into the one model on the device. Every method is called on all ranks together."""

    def __init__(
        self, model: HiddenStatesModel, bridge: Bridge, snapshots: WeightSnapshots, verification: Verification
    ) -> None:
        self._model, self._bridge, self._snapshots, self._verification = model, bridge, snapshots, verification

    def load(self, source: Source, *, any_vocabulary: bool = False) -> Fingerprint:
        """Verify the checkpoint and load its weights into the model; returns their fingerprint."""
        self._verification.require(source.location, source.flag)
        load_weights(self._model, self._bridge, source.location, source.flag, any_vocabulary=any_vocabulary)
        return fingerprint(self._model)

    def keep(self, name: str, source: Source, *, resident: bool = False, any_vocabulary: bool = False) -> Fingerprint:
        """Load a frozen model and keep a copy of its weights under `name`; returns their fingerprint.

        Raises CheckpointError where matrices stayed empty.
        """
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.zero_()
        loaded = self.load(source, any_vocabulary=any_vocabulary)
        # Norms and biases may be zero, and a rank's share of a small vocabulary; no other matrix is zero once it is
        # loaded.
        untouched = [
            key
            for key, weight in self._model.named_parameters()
            if weight.dim() > 1 and not weight.any() and not is_padding(key, weight, self._bridge.vocab_size)
        ]
        if untouched:
            raise CheckpointError(
                f"{source}: the {name} was not loaded in full: {len(untouched)} matrices are still empty, first {untouched[0]}"
            )
        self._snapshots.keep(name, resident=resident)
        return loaded
