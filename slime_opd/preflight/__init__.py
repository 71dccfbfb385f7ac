"""`--check`: everything about a run that can be found out without starting it.

The rules of `config.checks`, and what takes reading or asking: the data, the rewards, the checkpoints' shapes, the teacher, the
disk. All problems are printed together; what could not be looked at is said too. An estimate of memory is no problem but a figure.
"""

from __future__ import annotations

from slime_opd.config import Config
from slime_opd.config.checks import CHECKS, notes, problems
from slime_opd.memory_estimate import estimates, size_of
from slime_opd.preflight.disk import look_at_disk
from slime_opd.preflight.findings import Findings
from slime_opd.preflight.inputs import look_at_inputs
from slime_opd.preflight.start import look_at_start
from slime_opd.preflight.teacher import ask_teacher
from slime_opd.preflight.weights import look_at_checkpoints, read_json


def preflight(config: Config, problems_of_words: list[str]) -> Findings:
    """Look at everything, whatever is wrong with the rest."""
    found = Findings([*problems_of_words, *problems(config, CHECKS)])
    found.fine += [f"note: {note}" for note in notes(config)]
    architecture = read_json(config.model.hf_checkpoint, "config.json")
    architecture = architecture.get("text_config", architecture)
    inputs = look_at_inputs(config, found)
    if inputs is not None:
        ask_teacher(config, inputs.tokenizer, found)
    look_at_checkpoints(config, architecture, found)
    if config.model.hf_checkpoint is not None:
        look_at_start(config, found)
    if size := size_of(architecture):
        found.figures += estimates(config, architecture, size)
        look_at_disk(config, size, found)
    else:
        found.unchecked.append("memory and disk: no size could be read from --hf-checkpoint's config.json")
    return found
