"""Chooses where a run starts from, by the table of `start_table.py`.

`read_facts` reads the directories; `choose_start` is pure and decides from the command line's request and those facts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_opd.checkpoint import aside, directory
from slime_opd.checkpoint.location import RUN_STATE, Location
from slime_opd.checkpoint.start_table import RULES, Loaded, Outcome, Saved
from slime_opd.config import Config
from slime_opd.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Request:
    """The start that a command line requests. Paths are absolute; `loads_save`: --load is --save."""

    save: str | None
    load: str | None
    loads_save: bool
    ckpt_step: int | None
    finetune: bool
    ref_load: str | None
    ref_ckpt_step: int | None
    hf_checkpoint: str | None

    def recorded(self) -> dict[str, Any]:
        """The request as a checkpoint records it, in JSON values. `--load SAVE` and no --load are the same start."""
        return {
            "load": None if self.loads_save else self.load,
            "ckpt_step": self.ckpt_step,
            "finetune": self.finetune,
            "ref_load": self.ref_load,
            "ref_ckpt_step": self.ref_ckpt_step,
            "hf_checkpoint": self.hf_checkpoint,
        }


def request_of(config: Config) -> Request:
    """The start that the options request."""
    options = config.checkpoint
    save, load, step = _absolute(options.save), _absolute(options.load), options.ckpt_step
    if save is not None and load is not None and os.path.dirname(load) == save:
        # --load is the directory of one checkpoint of --save.
        name = os.path.basename(load)
        if name.startswith("iter_") and name.removeprefix("iter_").isdigit():
            load, step = save, int(name.removeprefix("iter_"))
        elif name == "release":
            load = save
    return Request(
        save=save,
        load=load,
        loads_save=save is not None and load == save,
        ckpt_step=step,
        finetune=options.finetune,
        ref_load=_absolute(options.ref_load),
        ref_ckpt_step=options.ref_ckpt_step,
        hf_checkpoint=_absolute(config.model.hf_checkpoint),
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.realpath(path)


@dataclass(frozen=True)
class Contents:
    """Contents of a directory of checkpoints.

    `location`: the newest or the requested checkpoint; None without one. `run_state`: the driver's state beside it;
    None without such a file. `steps`: those of the complete checkpoints. `aside`: the directory that was set aside
    last.
    """

    location: Location | None = None
    run_state: Mapping[str, Any] | None = None
    steps: tuple[int, ...] = ()
    aside: str | None = None

    @property
    def record(self) -> Mapping[str, Any]:
        """Record of the run that wrote the checkpoint (see `record.py`); {} without one."""
        return (self.run_state or {}).get("run", {})


@dataclass(frozen=True)
class Facts:
    """Contents of --save and --load, and the identity of this run (`record.identity_of`)."""

    save: Contents = Contents()
    load: Contents = Contents()
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_facts(request: Request, identity: Mapping[str, Any]) -> Facts:
    """Read --save and --load. Raises CheckpointError for a directory that contradicts itself."""
    save = load = Contents()
    loads_elsewhere = request.load is not None and not request.loads_save
    if request.save is not None:
        save = _contents_of_save(request.save, None if loads_elsewhere else request.ckpt_step)
    if request.load is not None and loads_elsewhere:
        load = _contents(request.load, "--load", request.ckpt_step)
    return Facts(save, load, identity)


def _contents_of_save(path: str, step: int | None) -> Contents:
    try:
        return _contents(path, "--save")
    except CheckpointError:
        # The newest checkpoint is damaged: the user may choose an earlier one with --ckpt-step.
        if step is None:
            raise
        return _contents(path, "--save", step)


def _contents(path: str, flag: str, step: int | None = None) -> Contents:
    root = Path(path)
    location = directory.find(path, step, flag=flag)
    run_state = None
    if location is not None and (location.directory / RUN_STATE).is_file():
        run_state = directory.read_run_state(location)
    moved = aside.aside_directories(root)
    return Contents(location, run_state, tuple(aside.complete_steps(root)), str(moved[-1]) if moved else None)


def saved_kind(request: Request, facts: Facts) -> Saved:
    """The kind of contents of --save."""
    contents = facts.save
    if contents.location is None:
        return Saved.NOTHING if contents.aside is None else Saved.ASIDE
    if contents.location.iteration is None:
        return Saved.WEIGHTS
    if contents.run_state is None:
        return Saved.FOREIGN
    if not contents.record or not (request.loads_save or not differing_identity(contents.record, facts.identity)):
        return Saved.OTHER
    differing = differing_request(contents.record, request)
    if not differing:
        return Saved.RESTART
    return Saved.OWN if set(differing) <= {"ckpt_step", "finetune"} else Saved.OTHER


def loaded_kind(request: Request, facts: Facts) -> Loaded:
    """The kind of contents of --load."""
    if request.load is None:
        return Loaded.NONE
    if request.loads_save:
        return Loaded.SAVE
    contents = facts.load
    if contents.location is None:
        return Loaded.EMPTY
    if contents.location.iteration is None:
        return Loaded.WEIGHTS
    return Loaded.FOREIGN if contents.run_state is None else Loaded.RUN


def differing_identity(record: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Parts of the identity in which the recorded run differs from this one; only parts that both have are compared."""
    saved = record.get("identity", {})
    return [name for name in identity if name in saved and saved[name] != identity[name]]


def differing_request(record: Mapping[str, Any], request: Request) -> list[str]:
    """Options of the start that the recorded command gave with other values."""
    now, saved = request.recorded(), record.get("request", {})
    return [name for name in now if now[name] != saved.get(name)]


@dataclass(frozen=True)
class Start:
    """The start of a run: from the checkpoint in `path`, the directory of `flag`, after `step` rollouts of the run."""

    outcome: Outcome
    flag: str
    path: str | None
    step: int = 0

    @property
    def newest_kept(self) -> int | None:
        """Checkpoints of --save after this step are set aside before the first new save; None: all are."""
        return self.step if self.outcome in (Outcome.CONTINUE_NEWEST, Outcome.CONTINUE_STEP) else None

    def resolve(self, config: Config) -> Config:
        """The trainers' configuration: its --load is the checkpoint to load, or None."""
        loads = self.flag in ("--save", "--load")
        resolved = dataclasses.replace(
            config.checkpoint,
            load=self.path if loads else None,
            ckpt_step=None,
            finetune=loads and not self.outcome.continues,
        )
        return dataclasses.replace(config, checkpoint=resolved)


def choose_start(request: Request, facts: Facts) -> Start:
    """The start by the table.

    Raises ConfigError where the table refuses, or --save has no checkpoint of --ckpt-step.
    """
    saved, loaded = saved_kind(request, facts), loaded_kind(request, facts)
    outcome = next(rule.outcome for rule in RULES if rule.matches(request, saved, loaded))
    if outcome.is_refusal:
        raise ConfigError(_refusal(outcome, saved, request, facts))
    if outcome in (Outcome.CONTINUE_STEP, Outcome.WEIGHTS_OF_SAVE) and request.ckpt_step is not None:
        return Start(outcome, "--save", *_requested_step(request, facts, outcome))
    if outcome in (Outcome.CONTINUE_NEWEST, Outcome.WEIGHTS_OF_SAVE):
        return _start_from(outcome, "--save", facts.save.location)
    if outcome is Outcome.WEIGHTS_OF_ASIDE:
        return Start(outcome, "--save", facts.save.aside)
    if outcome in (Outcome.CONTINUE_LOAD, Outcome.WEIGHTS_OF_LOAD):
        return _start_from(outcome, "--load", (facts.save if request.loads_save else facts.load).location)
    if outcome is Outcome.WEIGHTS_OF_REFERENCE:
        return Start(outcome, "--ref-load", request.ref_load)
    return Start(outcome, "--hf-checkpoint", request.hf_checkpoint)


def _start_from(outcome: Outcome, flag: str, location: Location | None) -> Start:
    assert location is not None  # the table gives these outcomes only where there is a checkpoint
    step = location.iteration if outcome.continues else 0
    return Start(outcome, flag, str(location.directory), step or 0)


def _requested_step(request: Request, facts: Facts, outcome: Outcome) -> tuple[str, int]:
    step, steps = request.ckpt_step, facts.save.steps
    if request.save is None or step not in steps:
        raise ConfigError(
            f"--ckpt-step {step}: {request.save} holds no complete checkpoint of that step; existing steps: {', '.join(map(str, steps)) or 'none'}"
        )
    return str(aside.iteration_path(Path(request.save), step)), step if outcome.continues else 0


def _refusal(outcome: Outcome, saved: Saved, request: Request, facts: Facts) -> str:
    if outcome is Outcome.REFUSE_ASIDE:
        return f"--save {request.save} holds only checkpoints that were set aside: continue from them with --load {facts.save.aside}, start from their weights with --finetune, or give another --save"
    if outcome is Outcome.REFUSE_FOREIGN:
        location = (facts.save if request.loads_save else facts.load).location
        return f"--load {location and location.directory} has no {RUN_STATE}, so its step and its position in the prompts are unknown: add --finetune to start at step 0 with its weights"
    start_over = f"--load {request.save} --finetune to start at step 0 with its weights (its checkpoints are set aside)"
    if saved is Saved.WEIGHTS:
        return f"--save {request.save} holds weights that this command does not start from: give another --save, or --load {request.save} to start from them"
    if saved is Saved.FOREIGN:
        return f"--save {request.save} holds checkpoints that are not this run's: give another --save, or {start_over}"
    return f"--save {request.save} holds checkpoints of another run ({_reason(request, facts)}): give another --save, --load {request.save} to continue that run, or {start_over}"


def _reason(request: Request, facts: Facts) -> str:
    record = facts.save.record
    if not record:
        return "the command that wrote them is not recorded"
    if names := differing_identity(record, facts.identity):
        what = {"architecture": "of another architecture", "loss_type": "with another --loss-type"}
        return " and ".join(what.get(name, f"on other {name}") for name in names)
    now = request.recorded()
    parts = [
        f"{'--' + name.replace('_', '-')} was {'not given' if saved in (None, False) else saved}, now {'not given' if now[name] in (None, False) else now[name]}"
        for name in differing_request(record, request)
        for saved in [record.get("request", {}).get(name)]
    ]
    return "; ".join(parts)
