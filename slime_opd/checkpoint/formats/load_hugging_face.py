"""Copies the weights of a Hugging Face directory into a model; each rank reads what it needs, without communication."""

from __future__ import annotations

from slime_opd.checkpoint.formats.hf_reader import WeightReader
from slime_opd.errors import CheckpointError
from slime_opd.model.bridge import ModelBridge
from slime_opd.model.hidden_states import HiddenStatesModel

# Parameters whose weights are in memory at one time. A file is opened once for each batch, and opening a file of
# thousands of weights takes longer than reading one of them.
_BATCH = 32


def load_hugging_face(model: HiddenStatesModel, bridge: ModelBridge, directory: str, flag: str) -> None:
    """Copy the weights of `directory`, the value of the option `flag`, into this rank's model.

    Raises CheckpointError where the directory lacks some.
    """
    reader = WeightReader(directory)
    names = bridge.global_names(model, with_global_experts=True)
    sources = {local_name: bridge.hf_names(name) for local_name, name in names.items()}
    needed = {source for several in sources.values() for source in several}
    if missing := sorted(needed - reader.names):
        raise CheckpointError(
            f"{flag} {directory} lacks {len(missing)} of the weights that its config.json describes, first {missing[0]}"
        )
    parameters = model.state_dict()
    pending = list(sources)
    while pending:
        batch, pending = pending[:_BATCH], pending[_BATCH:]
        weights = reader.read_several({source for local_name in batch for source in sources[local_name]})
        for local_name in batch:
            name, parameter = names[local_name], parameters[local_name]
            whole = bridge.to_megatron(name, [weights[source] for source in sources[local_name]])
            parameter.copy_(bridge.shard(name, whole, parameter))
