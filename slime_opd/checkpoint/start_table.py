"""The table of starts: the contents of --save and --load and the given flags decide what a run does.

`start.py` applies it; docs/checkpoints.md shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime_opd.checkpoint.start import Request


class Saved(Enum):
    """Kinds of contents of --save, under the table's names; MEANINGS explains them."""

    NOTHING = "nothing"
    RESTART = "this command's"
    OWN = "this run's"
    OTHER = "another run's"
    FOREIGN = "foreign"
    WEIGHTS = "weights"
    ASIDE = "set aside"


class Loaded(Enum):
    """Kinds of --load, under the table's names."""

    NONE = "not given"
    SAVE = "`--save`"
    EMPTY = "elsewhere: nothing"
    RUN = "elsewhere: a run's"
    FOREIGN = "elsewhere: foreign"
    WEIGHTS = "elsewhere: weights"


MEANINGS: dict[str, str] = {
    "nothing": "no checkpoint, or no such directory",
    "this command's": "checkpoints of this run, whose command gave the same start: `--load`, `--ref-load`, `--ckpt-step`, `--finetune`, `--hf-checkpoint`",
    "this run's": "checkpoints of this run, whose command gave another `--ckpt-step` or `--finetune`",
    "another run's": "checkpoints of a run with another start, architecture, loss type or prompts, or of a version that recorded none of that",
    "foreign": "iterations without `run_state.json`, as Megatron-LM and slime write them",
    "weights": "a `release` (a converted model), or a Hugging Face directory",
    "set aside": "only checkpoints that were set aside, by a `--finetune` that has not saved yet",
}


class Outcome(Enum):
    """What the run does, in the words of the table and the log."""

    CONTINUE_NEWEST = "continues from the newest checkpoint of `--save`"
    CONTINUE_STEP = "continues from that step of `--save`; later ones are set aside"
    CONTINUE_LOAD = "continues from `--load`, and saves to `--save`"
    WEIGHTS_OF_SAVE = "starts at step 0 with the weights of `--save`; all its checkpoints are set aside"
    WEIGHTS_OF_ASIDE = "starts at step 0 with the weights that were set aside last"
    WEIGHTS_OF_LOAD = "starts at step 0 with the weights of `--load`"
    WEIGHTS_OF_REFERENCE = "starts at step 0 with the weights of `--ref-load`"
    WEIGHTS_OF_HUGGING_FACE = "starts at step 0 with the weights of `--hf-checkpoint`"
    REFUSE_OTHER = "is refused: give another `--save`, or `--load` that directory"
    REFUSE_FOREIGN = "is refused: its position in the prompts is unknown; `--finetune` takes the weights"
    REFUSE_ASIDE = "is refused: `--load` the directory that was set aside, or give another `--save`"

    @property
    def is_refusal(self) -> bool:
        """Whether no run starts."""
        return self.name.startswith("REFUSE")

    @property
    def continues(self) -> bool:
        """Whether step, position in the prompts and optimizer are resumed, not only the weights."""
        return self.name.startswith("CONTINUE")


@dataclass(frozen=True)
class Rule:
    """One row: kinds of --save and of --load (empty: any), a flag that must be given (None: none), the outcome."""

    saved: tuple[Saved, ...]
    loaded: tuple[Loaded, ...]
    flag: str | None
    outcome: Outcome

    def matches(self, request: Request, saved: Saved, loaded: Loaded) -> bool:
        """Whether this row applies."""
        value = True if self.flag is None else getattr(request, self.flag)
        is_given = value is not None and value is not False
        return is_given and (not self.saved or saved in self.saved) and (not self.loaded or loaded in self.loaded)


_HERE = (Loaded.SAVE, Loaded.NONE)
_ELSEWHERE = (Loaded.EMPTY, Loaded.RUN, Loaded.FOREIGN, Loaded.WEIGHTS)
_RUNS = (Saved.OWN, Saved.OTHER)

# The first row that matches applies.
RULES: tuple[Rule, ...] = (
    Rule((Saved.RESTART,), (), None, Outcome.CONTINUE_NEWEST),
    Rule((Saved.OTHER, Saved.FOREIGN, Saved.WEIGHTS), (Loaded.NONE,), None, Outcome.REFUSE_OTHER),
    Rule((Saved.OWN, Saved.OTHER, Saved.FOREIGN, Saved.WEIGHTS), _ELSEWHERE, None, Outcome.REFUSE_OTHER),
    Rule((*_RUNS, Saved.FOREIGN), _HERE, "finetune", Outcome.WEIGHTS_OF_SAVE),
    Rule((Saved.FOREIGN,), _HERE, None, Outcome.REFUSE_FOREIGN),
    Rule(_RUNS, _HERE, "ckpt_step", Outcome.CONTINUE_STEP),
    Rule(_RUNS, _HERE, None, Outcome.CONTINUE_NEWEST),
    Rule((Saved.WEIGHTS,), (Loaded.SAVE,), None, Outcome.WEIGHTS_OF_LOAD),
    Rule((Saved.ASIDE,), _HERE, "finetune", Outcome.WEIGHTS_OF_ASIDE),
    Rule((Saved.ASIDE,), _HERE, None, Outcome.REFUSE_ASIDE),
    Rule((), (Loaded.RUN, Loaded.FOREIGN, Loaded.WEIGHTS), "finetune", Outcome.WEIGHTS_OF_LOAD),
    Rule((), (Loaded.FOREIGN,), None, Outcome.REFUSE_FOREIGN),
    Rule((), (Loaded.RUN,), None, Outcome.CONTINUE_LOAD),
    Rule((), (Loaded.WEIGHTS,), None, Outcome.WEIGHTS_OF_LOAD),
    Rule((), (), "ref_load", Outcome.WEIGHTS_OF_REFERENCE),
    Rule((), (), None, Outcome.WEIGHTS_OF_HUGGING_FACE),
)


def rules_as_markdown() -> str:
    """The table, as docs/checkpoints.md shows it."""
    lines = ["| `--save` holds | `--load` is | given | the run |", "| --- | --- | --- | --- |"]
    for rule in RULES:
        saved = " or ".join(kind.value for kind in rule.saved) or "anything"
        loaded = " or ".join(kind.value for kind in rule.loaded) or "anything"
        loaded = "elsewhere" if rule.loaded == _ELSEWHERE else loaded
        given = "" if rule.flag is None else f"`--{rule.flag.replace('_', '-')}`"
        lines.append(f"| {saved} | {loaded} | {given} | {rule.outcome.value} |")
    return "\n".join(lines)


def meanings_as_markdown() -> str:
    """The meanings of the table's names, as docs/checkpoints.md shows them."""
    rows = [f"| {name} | {meaning} |" for name, meaning in MEANINGS.items()]
    return "\n".join(["| name | what the directory holds |", "| --- | --- |", *rows])
