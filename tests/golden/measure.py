"""Train every kind on its five recorded rollouts, and print or store the numbers.

    python tests/golden/measure.py            prints a digest of losses, gradient norms and weights per kind and layout
    python tests/golden/measure.py --write    writes the numbers of one process to expected.json

A refactoring must not change the digests on one machine.
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
    """Save the student and the teacher that the rollouts were recorded with."""
    from conftest import save_tiny_model

    for name, seed in (("student", STUDENT_SEED), ("teacher", TEACHER_SEED)):
        (directory / name).mkdir()
        save_tiny_model(directory / name, seed=seed)


def measure(layout: str, directory: Path) -> dict[str, Any]:
    """Train every kind; returns for each METRICS per rollout, merged over ranks, and the final Hugging Face weights."""
    from ranks import run_ranks

    from slime_opd.metrics import merge, values

    processes, tensor = LAYOUTS[layout]
    ranks = run_ranks(train_kinds, processes, directory, str(directory), tensor)
    outcomes = {}
    for name in KINDS:
        metrics_by_step = zip(*(rank[name]["steps"] for rank in ranks), strict=True)
        steps = [values(merge([metrics for metrics in step if metrics])) for step in metrics_by_step]
        outcomes[name] = {
            "steps": [[step[metric] for metric in METRICS] for step in steps],
            "weights": ranks[0][name]["weights"],
        }
    return outcomes


def train_kinds(rank: int, world_size: int, init_method: str, directory: str, tensor: int) -> dict[str, Any]:
    """Train every kind; returns for each this rank's metrics per rollout and the final weights."""
    return {
        name: train_kind(name, rank, world_size, f"{init_method}_{i}", directory, tensor)
        for i, name in enumerate(KINDS)
    }


def train_kind(name: str, rank: int, world_size: int, init_method: str, directory: str, tensor: int) -> dict[str, Any]:
    """Train one kind; returns this rank's metrics per rollout and the final weights."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from rollouts import train

    from slime_opd.config import parse
    from slime_opd.rollout.recording import Recordings, require_trainable
    from slime_opd.trainer.trainer import Trainer

    layout = ["--actor-num-gpus-per-node", str(world_size), "--tensor-model-parallel-size", str(tensor)]
    argv = flags(KINDS[name].flags, Path(directory) / "student", Path(directory) / "teacher")
    config = parse([*argv, *layout])
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
    """The stored numbers of one kind: its metrics and, per weight, the sum of squares and a position-weighted sum."""
    import numpy as np

    sums = {}
    for name, weight in outcome["weights"].items():
        flat = weight.astype(np.float64).ravel()
        sums[name] = [float(flat @ flat), float(flat @ np.linspace(0, 1, flat.size))]
    return {"steps": outcome["steps"], "weights": sums}


def digest(outcome: dict[str, Any]) -> str:
    """A hash of all bits of the metrics and weights."""
    hashed = hashlib.sha256(json.dumps(outcome["steps"]).encode())
    for name, weight in sorted(outcome["weights"].items()):
        hashed.update(name.encode() + weight.tobytes())
    return hashed.hexdigest()[:16]


def main() -> None:
    """Measure every layout, or write the numbers of one process."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_models(directory)
        for layout in LAYOUTS:
            outcomes = measure(layout, directory)
            if "--write" in sys.argv:
                EXPECTED.write_text(
                    json.dumps({name: summary(outcome) for name, outcome in outcomes.items()}, indent=1) + "\n"
                )
                return
            for name, outcome in outcomes.items():
                print(f"{layout:12} {name:32} {digest(outcome)}  loss {outcome['steps'][-1][0]:.9g}", flush=True)


if __name__ == "__main__":
    main()
