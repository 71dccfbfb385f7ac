"""The kinds of golden runs: their flags, and the recorded rollouts that they train on.

`record.py` records the rollouts with real runs; `measure.py` trains five steps of each kind on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROLLOUTS = Path(__file__).parent / "rollouts"
NUM_ROLLOUTS = 5

# Seeds of the tiny models (tests/conftest.py).
STUDENT_SEED, TEACHER_SEED = 0, 1

# Flags of every kind. Samples have a few tokens, so --max-tokens-per-gpu 64 gives several micro-batches per step.
COMMON = f"""
--megatron-to-hf-mode bridge --rollout-batch-size 4 --n-samples-per-prompt 2 --rollout-max-response-len 12
--num-rollout {NUM_ROLLOUTS} --use-dynamic-batch-size --max-tokens-per-gpu 64 --log-probs-chunk-size 16 --lr 1e-4
""".split()

# A random model never answers correctly, so the reward depends on the length of the response.
_REWARD = "--custom-rm-path golden_reward.every_other"
_SGLANG = "--use-opd --opd-type sglang --rm-url TEACHER_URL/generate"
_MEGATRON = "--use-opd --opd-type megatron --opd-teacher-load TEACHER"

# Recordings, with the flags of the runs that make them.
RECORDINGS: Mapping[str, str] = {
    "fine-tuning": "--loss-type sft_loss --label-key response --n-samples-per-prompt 1 --rollout-batch-size 8",
    "rewards": _REWARD,
    "scored": f"{_REWARD} {_SGLANG}",
    "top-k": f"{_SGLANG} --opd-divergence reverse_kl --opd-log-prob-top-k 4 --opd-top-k-strategy union --opd-off-policy-fraction 0.25",
}


@dataclass(frozen=True)
class Kind:
    """A golden run: a recording and the flags to train on it."""

    recording: str
    flags: str


KINDS: Mapping[str, Kind] = {
    "fine-tuning": Kind("fine-tuning", RECORDINGS["fine-tuning"]),
    "penalty of a teacher server": Kind("scored", RECORDINGS["scored"]),
    "penalty of a Megatron teacher": Kind("rewards", f"{_REWARD} {_MEGATRON} --opd-kl-discount 0.9"),
    "full divergence": Kind("rewards", f"{_MEGATRON} --opd-divergence jsd --opd-kl-coef 0.5"),
    "top-k": Kind("top-k", RECORDINGS["top-k"]),
    "token weights": Kind(
        "rewards",
        f"{_REWARD} {_MEGATRON} --opd-divergence reverse_kl --opd-token-weighting top --opd-reward-beta 0.5 --opd-pass-rate-weights 1 1",
    ),
    "GRPO with a reference": Kind(
        "rewards",
        f"{_REWARD} --use-kl-loss --kl-loss-coef 0.1 --kl-loss-type low_var_kl --ref-load TEACHER --finetune --load STUDENT --entropy-coef 0.01",
    ),
    "several steps per rollout": Kind(
        "rewards", f"{_REWARD} {_MEGATRON} --num-steps-per-rollout 2 --normalize-advantages"
    ),
}


def flags(text: str, student: str | Path, teacher: str | Path, teacher_url: str = "http://127.0.0.1:9") -> list[str]:
    """The arguments for the flags `text` of a kind or recording, with placeholders replaced by paths and URLs."""
    paths = {"TEACHER_URL": teacher_url, "TEACHER": str(teacher), "STUDENT": str(student)}
    argv = ["--hf-checkpoint", str(student), *COMMON]
    for argument in text.split():
        for name, value in paths.items():
            argument = argument.replace(name, value)
        argv.append(argument)
    return argv
