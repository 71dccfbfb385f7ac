"""Copying the weights of a Hugging Face directory into a model; each rank reads what it needs, without any other."""

from __future__ import annotations

from mbridge.core.bridge import Bridge

from slime_opd.checkpoint.formats.hugging_face import Weights
from slime_opd.errors import CheckpointError
from slime_opd.model.builder import HiddenStatesModel

# Parameters whose weights are in memory at one time. A file is opened once for each batch, and to open one that holds
# thousands of weights takes longer than to read one of them.
_BATCH = 32


def load_hugging_face(model: HiddenStatesModel, bridge: Bridge, directory: str, flag: str) -> None:
    """Copy the weights of `directory`, which the option `flag` names, into this rank's model.

    Raises CheckpointError where the directory lacks some.
    """
    weights = Weights(directory, bridge)
    # Under the number that a layer and an expert has in the whole model.
    names = bridge._weight_name_mapping_mcore_local_to_global(model)
    sources = {name: bridge._weight_name_mapping_mcore_to_hf(whole) for name, whole in names.items()}
    needed = {source for several in sources.values() for source in several}
    if missing := sorted(needed - weights.names):
        raise CheckpointError(
            f"{flag} {directory} lacks {len(missing)} of the weights that its config.json describes, first {missing[0]}"
        )
    tensors = model.state_dict()
    pending = list(sources)
    while pending:
        batch, pending = pending[:_BATCH], pending[_BATCH:]
        values = weights.read_several({source for name in batch for source in sources[name]})
        for name in batch:
            whole = bridge._weight_to_mcore_format(name, [values[source] for source in sources[name]])
            is_expert = ".mlp.experts.linear_fc" in name
            size, rank = (
                (bridge.mpu.etp_size, bridge.mpu.etp_rank) if is_expert else (bridge.mpu.tp_size, bridge.mpu.tp_rank)
            )
            tensors[name].copy_(bridge._weight_split_across_tp(name, whole, tensors[name], size)[rank])
