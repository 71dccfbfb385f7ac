"""Train five steps of every kind on its recorded rollouts, and print or keep the numbers.

    python tests/golden/measure.py                 a digest of losses, gradient norms and weights, by kind and layout
    python tests/golden/measure.py --write         the numbers of one process, into expected.json

Before and after a change that must change no number, on one machine, the first prints the same lines.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "dist")]

from kinds import KINDS, NUM_ROLLOUTS, ROLLOUTS, STUDENT_SEED, TEACHER_SEED, flags  # noqa: E402

EXPECTED = HERE / "expected.json"
VOCABULARY = 64
# (number of processes, tensor-parallel size)
LAYOUTS = {"one process": (1, 1), "TP=2": (2, 2), "DP=2": (2, 1)}
METRICS = ("train/loss", "train/grad_norm")


def save_models(directory: Path) -> None:
    """The student and the teacher, as when the rollouts were recorded."""
    from conftest import save_tiny_model

    for name, seed in (("student", STUDENT_SEED), ("teacher", TEACHER_SEED)):
        (directory / name).mkdir()
        save_tiny_model(directory / name, seed=seed)


def measure(layout: str, directory: Path) -> dict[str, Any]:
    """By kind: METRICS of each rollout, over all ranks, and the weights after the last one, by their Hugging Face names."""
    from ranks import run_ranks

    from slime_opd.metrics import merge, values

    processes, tensor = LAYOUTS[layout]
    ranks = run_ranks(train_kinds, processes, directory, str(directory), tensor)
    outcomes = {}
    for name in KINDS:
        of_steps = zip(*(rank[name]["steps"] for rank in ranks), strict=True)
        steps = [values(merge([one for one in of_ranks if one])) for of_ranks in of_steps]
        outcomes[name] = {
            "steps": [[step[metric] for metric in METRICS] for step in steps],
            "weights": ranks[0][name]["weights"],
        }
    return outcomes


def train_kinds(rank: int, world_size: int, init_method: str, directory: str, tensor: int) -> dict[str, Any]:
    """By kind: this rank's metrics of each rollout, and the weights after the last one."""
    return {
        name: train_kind(name, rank, world_size, f"{init_method}_{i}", directory, tensor)
        for i, name in enumerate(KINDS)
    }


def train_kind(name: str, rank: int, world_size: int, init_method: str, directory: str, tensor: int) -> dict[str, Any]:
    """What `train_kinds` gives of one kind."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from rollouts import train

    from slime_opd.config import parse
    from slime_opd.rollout.recording import Recordings, require_trainable
    from slime_opd.trainer.trainer import Trainer

    layout = ["--actor-num-gpus-per-node", str(world_size), "--tensor-model-parallel-size", str(tensor)]
    words = flags(KINDS[name].flags, Path(directory) / "student", Path(directory) / "teacher")
    config = parse([*words, *layout])
    recordings = Recordings(str(ROLLOUTS / KINDS[name].recording / "{rollout_id}.parquet"), VOCABULARY)
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    steps = []
    for step in range(NUM_ROLLOUTS):
        rollout = recordings.read(step + 1)
        require_trainable(rollout, config)
        steps.append(train(trainer, rollout.samples, step / NUM_ROLLOUTS))
    weights = {name: tensor.float().numpy().copy() for name, tensor in trainer.exported_weights()}
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return {"steps": steps, "weights": weights}


def summary(outcome: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one kind: its metrics, and each weight's sum of squares and of its entries times their places."""
    import numpy as np

    kept = {}
    for name, weight in outcome["weights"].items():
        flat = weight.astype(np.float64).ravel()
        kept[name] = [float(flat @ flat), float(flat @ np.linspace(0, 1, flat.size))]
    return {"steps": outcome["steps"], "weights": kept}


def digest(outcome: dict[str, Any]) -> str:
    """A hash of every bit of metrics and weights."""
    found = hashlib.sha256(json.dumps(outcome["steps"]).encode())
    for name, weight in sorted(outcome["weights"].items()):
        found.update(name.encode() + weight.tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Measure every layout, or write the numbers of one process."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_models(directory)
        for layout in LAYOUTS:
            outcomes = measure(layout, directory)
            if "--write" in sys.argv:
                EXPECTED.write_text(
                    json.dumps({name: summary(found) for name, found in outcomes.items()}, indent=1) + "\n"
                )
                return
            for name, found in outcomes.items():
                print(f"{layout:12} {name:32} {digest(found)}  loss {found['steps'][-1][0]:.9g}", flush=True)


if __name__ == "__main__":
    main()
