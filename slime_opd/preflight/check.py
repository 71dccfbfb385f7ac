"""`--check`: checks everything about a run without starting it; a run makes the quick checks before it starts.

The rules of `preflight.rules`, then weights, checkpoints, data, rewards, the teacher and the disk. All
problems are printed together, with the checks that could not be made. An estimate of memory is a figure, never a
problem.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from slime_opd.checkpoint import directory
from slime_opd.config import Config
from slime_opd.config.hf_config import architecture_of
from slime_opd.config.output import print_text, terminal_width
from slime_opd.config.parser import parse_all
from slime_opd.errors import ConfigError
from slime_opd.observe import console
from slime_opd.preflight import check_kernels
from slime_opd.preflight.disk import inspect_disk, inspect_written_directories
from slime_opd.preflight.findings import Findings, guarded, internal_error
from slime_opd.preflight.inputs import inspect_inputs
from slime_opd.preflight.memory_estimate import estimates, size_of
from slime_opd.preflight.rules import notes, problems
from slime_opd.preflight.start import inspect_start, trainer_config
from slime_opd.preflight.teacher import inspect_teacher
from slime_opd.preflight.weights import inspect_checkpoints, inspect_weights


@dataclass
class Subject:
    """The run to inspect, values that several inspections need, and their findings."""

    config: Config
    found: Findings

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """--hf-checkpoint's config.json; {} where there is none that can be read."""
        return architecture_of(self.config)

    @cached_property
    def trainer_config(self) -> Config:
        """What the trainers would load: --load is the checkpoint that the run starts from, if it is one."""
        return trainer_config(self.config)


@dataclass(frozen=True)
class Inspection:
    """One part of `--check`. With `at_start` it reads little enough to be repeated by every run before it starts."""

    name: str
    run: Callable[[Subject], None]
    at_start: bool = False


def _rules(subject: Subject) -> None:
    subject.found.problems += problems(subject.config)
    subject.found.notes += notes(subject.config)


def _kernels(subject: Subject) -> None:
    subject.found.problems += check_kernels.check_kernels(subject.config)
    subject.found.notes += check_kernels.notes(subject.config)


def _weights(subject: Subject) -> None:
    subject.found.problems += directory.problems(subject.trainer_config)
    inspect_weights(subject.trainer_config, subject.found)


def _start(subject: Subject) -> None:
    if subject.config.model.hf_checkpoint is not None:
        inspect_start(subject.config, subject.found)


def _data_and_teacher(subject: Subject) -> None:
    inputs = inspect_inputs(subject.config, subject.found)
    if inputs is not None:
        inspect_teacher(subject.config, inputs.tokenizer, subject.found)


def _sizes(subject: Subject) -> None:
    size = size_of(subject.architecture)
    if size is None:
        subject.found.unchecked.append("memory and disk: no size could be read from --hf-checkpoint's config.json")
        return
    subject.found.figures += estimates(subject.config, subject.architecture, size)
    inspect_disk(subject.config, size, subject.found)


INSPECTIONS: tuple[Inspection, ...] = (
    Inspection("flags", _rules),
    Inspection("directories to write to", lambda s: inspect_written_directories(s.config, s.found), at_start=True),
    Inspection("kernels", _kernels, at_start=True),
    # A run chooses its start once it has read its prompts, and refuses then.
    Inspection("start", _start),
    Inspection("weights", _weights, at_start=True),
    Inspection("data and teacher", _data_and_teacher),
    Inspection("architectures", lambda s: inspect_checkpoints(s.trainer_config, s.architecture, s.found)),
    Inspection("memory and disk", _sizes),
)


def preflight(config: Config, flag_problems: list[str], inspections: tuple[Inspection, ...] = INSPECTIONS) -> Findings:
    """Make all inspections, whatever problems the others find."""
    found = Findings([*flag_problems])
    subject = Subject(config, found)
    for inspection in inspections:
        with console.working(f"checking: {inspection.name}"):
            guarded(found, inspection.name, lambda inspection=inspection: inspection.run(subject))
    return found


def check(arguments: list[str], inspections: tuple[Inspection, ...] = INSPECTIONS) -> int:
    """Print the findings about the run of these arguments. Returns the exit code: 2 if there is a problem."""
    found = Findings()
    try:
        found = preflight(*parse_all(arguments), inspections)
    except ConfigError as error:  # of --help with a group that there is none of
        found.problems += str(error).splitlines()
    except Exception as error:
        found.internal_errors.append(internal_error(error))
    print_text("\n".join(found.lines(terminal_width(sys.stdout))))
    return found.exit_code


def require_ready(config: Config) -> None:
    """The quick inspections, before a run starts. Raises ConfigError with every problem, one line each."""
    found = preflight(config, [], tuple(one for one in INSPECTIONS if one.at_start))
    for error in found.internal_errors:
        console.warn(error)
    if found.problems:
        raise ConfigError("\n".join(dict.fromkeys(found.problems)))
