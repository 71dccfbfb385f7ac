"""The training runs of the drill, and their input files: a tiny model, its tokenizer, and prompts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from drill.kinds import GRPO, SFT, SFT_TWO_RANKS, SGLANG_TEACHER, TWO_ENGINES, WITH_ENGINE

ROOT = Path(__file__).resolve().parents[2]
SAVE_INTERVAL = 3
TEACHER_TIMEOUT_S = 240
_PROMPTS = 512
# Rollouts of a run: enough steps for several kills.
_ROLLOUTS = {SFT: 36, SFT_TWO_RANKS: 36, GRPO: 24, SGLANG_TEACHER: 24, TWO_ENGINES: 24}


@dataclass(frozen=True)
class Material:
    """The input files of every run."""

    model: Path
    prompts: Path


def make_material(directory: Path) -> Material:
    """Write a random model of 0.4M parameters with its tokenizer, and 512 prompts with responses and labels.

    The task is the quickstart's, made by its program.
    """
    task = directory / "task"
    subprocess.run(
        [sys.executable, str(ROOT / "examples/quickstart/task.py"), str(task)], check=True, env=environment()
    )
    prompts = directory / "prompts.jsonl"
    with (task / "worked.jsonl").open(encoding="utf-8") as rows:
        prompts.write_text("".join(next(rows) for _ in range(_PROMPTS)), encoding="utf-8")
    return Material(task / "initial", prompts)


def environment() -> dict[str, str]:
    """The environment of a run: this repository's package, and one thread per process."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    # Without the drill's own scope: a run gets a new scope, as if a user had started it.
    inherited = {name: value for name, value in os.environ.items() if name != "SLIME_OPD_RUN"}
    search_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, **own, "PYTHONPATH": os.pathsep.join(search_path)}


def rollouts(stack: str) -> int:
    """Number of steps of a whole run."""
    return _ROLLOUTS[stack]


def is_deterministic(stack: str) -> bool:
    """Whether two runs end with the same weights, bit for bit. An engine's sampling depends on its load."""
    return stack not in WITH_ENGINE


def command(stack: str, material: Material, save: Path, teacher_url: str | None) -> list[str]:
    """The command of a run. `teacher_url`: the address of the SGLang teacher, for the stack that has one."""
    arguments = ["--hf-checkpoint", str(material.model), "--megatron-to-hf-mode", "bridge", "--ray-address", "local"]
    arguments += ["--prompt-data", str(material.prompts), "--input-key", "prompt", "--rollout-shuffle"]
    arguments += ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "4096", "--lr", "1e-3"]
    arguments += ["--num-rollout", str(rollouts(stack)), "--save", str(save), "--save-interval", str(SAVE_INTERVAL)]
    megatron_teacher = ["--use-opd", "--opd-type", "megatron", "--opd-teacher-load", str(material.model)]
    generation = ["--rollout-max-response-len", "48", "--label-key", "label", "--rm-type", "math"]
    arguments += {
        SFT: _FINE_TUNING,
        SFT_TWO_RANKS: [*_FINE_TUNING, "--actor-num-gpus-per-node", "2"],
        GRPO: [*generation, *_GROUPS, *megatron_teacher],
        SGLANG_TEACHER: [
            *("--rollout-max-response-len", "48", "--rollout-batch-size", "48"),
            *("--use-opd", "--opd-type", "sglang", "--rm-url", f"{teacher_url}/generate"),
        ],
        TWO_ENGINES: [*generation, *_GROUPS, "--rollout-num-gpus", "2"],
    }[stack]
    return [sys.executable, "-m", "slime_opd.train", *arguments]


_FINE_TUNING = ["--loss-type", "sft_loss", "--label-key", "response", "--rollout-batch-size", "128"]
_GROUPS = ["--rollout-batch-size", "12", "--n-samples-per-prompt", "4"]
