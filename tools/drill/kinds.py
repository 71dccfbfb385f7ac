"""The kinds of kills: the process, the signal, the phase of the run, and the expected outcome."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from signal import Signals
from typing import Any

SFT, SFT_TWO_RANKS = "sft", "sft_two_ranks"
GRPO, SGLANG_TEACHER, TWO_ENGINES = "grpo", "sglang_teacher", "two_engines"
WITH_ENGINE = (GRPO, SGLANG_TEACHER, TWO_ENGINES)
ALL_STACKS = (SFT, SFT_TWO_RANKS, *WITH_ENGINE)


class Phase(Enum):
    """The activity of a run at the moment of a kill."""

    START = "start"
    GENERATE = "generate"
    TRAIN = "train"
    UPDATE_WEIGHTS = "update weights"
    SAVE = "save"


# Supervised fine-tuning generates nothing.
PHASES_OF_SFT = (Phase.START, Phase.TRAIN, Phase.SAVE)


class Role(Enum):
    """The role of a process in a run."""

    DRIVER = "driver"
    GCS = "Ray's GCS"
    RAYLET = "raylet"
    AGENT = "Ray's agent"
    RAY = "another process of Ray"
    TRAINER = "trainer rank"
    ENGINE_ACTOR = "engine actor"
    WARDEN = "warden"
    LAUNCHER = "engine launcher"
    SCHEDULER = "engine scheduler"
    DETOKENIZER = "engine detokenizer"
    ROUTER = "router"
    REWARD = "reward worker"
    OTHER = "another process"


class Way(Enum):
    """How a process is attacked."""

    SIGNAL = "a signal to the process"
    GROUP = "a signal to its process group"
    HANG_UP = "its terminal is closed"
    STOP = "stopped for a while, then continued"


class Outcome(Enum):
    """The expected outcome of a kill. In any case nothing must be left, and the same command must resume the run."""

    ENDS = "ends"
    SURVIVES = "survives"
    EITHER = "ends or survives"


@dataclass(frozen=True)
class Kind:
    """One kind of kill.

    `codes`: the expected exit codes, as in `subprocess.Popen.returncode`. `sentence`: the beginning of a line that a
    run must print if it ends; "" if it cannot print one.
    """

    name: str
    role: Role
    stacks: tuple[str, ...] = ALL_STACKS
    phases: tuple[Phase, ...] = tuple(Phase)
    signal: Signals = Signals.SIGKILL
    way: Way = Way.SIGNAL
    outcome: Outcome = Outcome.ENDS
    codes: tuple[int, ...] = field(default=(1,))
    sentence: str = "slime_opd: error: "

    @property
    def is_in_terminal(self) -> bool:
        """Whether the run needs its own terminal."""
        return self.way is Way.HANG_UP

    def phases_on(self, stack: str) -> tuple[Phase, ...]:
        """The phases of this kind that exist in a run of `stack`."""
        return tuple(phase for phase in self.phases if stack in WITH_ENGINE or phase in PHASES_OF_SFT)


_RUNNING = (Phase.GENERATE, Phase.TRAIN, Phase.UPDATE_WEIGHTS, Phase.SAVE)
_USING_THE_ENGINE = (Phase.START, Phase.GENERATE, Phase.UPDATE_WEIGHTS)


def on_stacks(kinds: Iterable[Kind], stacks: Sequence[str]) -> list[Kind]:
    """The kinds, restricted to these stacks; without the kinds that apply to none of them."""
    narrowed = [replace(kind, stacks=tuple(stack for stack in kind.stacks if stack in stacks)) for kind in kinds]
    return [kind for kind in narrowed if kind.stacks]


def _of_driver(name: str, signal: Signals, code: int, way: Way = Way.SIGNAL, sentence: str = "") -> Kind:
    return Kind(name, Role.DRIVER, signal=signal, way=way, codes=(code,), sentence=sentence)


def _survived(name: str, role: Role, **fields: Any) -> Kind:
    return Kind(name, role, outcome=Outcome.SURVIVES, **fields)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _of_driver("driver-kill", Signals.SIGKILL, -9),
        _of_driver("driver-term", Signals.SIGTERM, 143, sentence="slime_opd: SIGTERM: "),
        _of_driver("driver-int", Signals.SIGINT, 130, sentence="slime_opd: SIGINT: "),
        _of_driver("terminal-closed", Signals.SIGHUP, 129, Way.HANG_UP),
        _of_driver("group-kill", Signals.SIGKILL, -9, Way.GROUP),
        Kind("gcs-kill", Role.GCS),
        Kind("raylet-kill", Role.RAYLET),
        Kind("ray-agent-kill", Role.AGENT, outcome=Outcome.EITHER),
        Kind("trainer-kill", Role.TRAINER, (SFT, *WITH_ENGINE)),
        Kind("one-of-two-ranks-kill", Role.TRAINER, (SFT_TWO_RANKS,)),
        Kind("engine-actor-kill", Role.ENGINE_ACTOR, WITH_ENGINE),
        Kind("warden-kill", Role.WARDEN, outcome=Outcome.EITHER),
        Kind("engine-launcher-kill", Role.LAUNCHER, WITH_ENGINE),
        Kind("engine-scheduler-kill", Role.SCHEDULER, WITH_ENGINE),
        Kind("engine-detokenizer-kill", Role.DETOKENIZER, WITH_ENGINE, phases=_USING_THE_ENGINE),
        Kind("router-kill", Role.ROUTER, (TWO_ENGINES,), phases=_RUNNING),
        _survived("reward-worker-kill", Role.REWARD, stacks=(GRPO,), phases=_RUNNING[:1]),
        _survived("trainer-stop", Role.TRAINER, phases=_RUNNING, signal=Signals.SIGSTOP, way=Way.STOP),
        _survived(
            "engine-stop",
            Role.SCHEDULER,
            stacks=WITH_ENGINE,
            phases=_RUNNING[:3],
            signal=Signals.SIGSTOP,
            way=Way.STOP,
        ),
    )
}
