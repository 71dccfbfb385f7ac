"""Data, rewards and tokenizers: what `--check` and the start of a run find out about them before Ray."""

from __future__ import annotations

from slime_opd.config import Config
from slime_opd.errors import ConfigError
from slime_opd.observe import console
from slime_opd.preflight.data import Inputs, inspect_data
from slime_opd.preflight.findings import Findings
from slime_opd.preflight.reward import inspect_reward
from slime_opd.preflight.tokenizers import inspect_teacher_tokenizer, inspect_tokenizer


def inspect_inputs(config: Config, found: Findings) -> Inputs | None:
    """Everything that needs the tokenizer and no other process of the run; None without a tokenizer."""
    tokenizer = inspect_tokenizer(config, found)
    if tokenizer is None:
        return None
    inputs = inspect_data(config, tokenizer, found)
    inspect_reward(config, inputs, found)
    inspect_teacher_tokenizer(config, tokenizer, found)
    return inputs


def load_inputs(config: Config) -> Inputs:
    """The inputs of a run, with a line about each on the console. Raises ConfigError with one line per problem."""
    found = Findings()
    inputs = inspect_inputs(config, found)
    for line in found.ok:
        console.say(line)
    for line in found.notes:
        console.say(f"note: {line}")
    for line in found.unchecked:
        console.say(f"not checked: {line}")
    if inputs is None or found.problems:
        raise ConfigError("\n".join(found.problems or found.unchecked))
    return inputs
