"""What the driver's part of a training step costs: shares to the ranks, scores back, assembly, columns to the ranks.

    python benchmarks/score_round_trip.py [--samples 512] [--tokens 2048] [--ranks 8]

Prints bytes per response token and seconds per million response tokens for each part: without scores that the driver
reads, and with the most of them (several steps per rollout with a penalty and token weighting). Arrays go through Ray's
shared memory on this machine, as on one node.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from slime_opd.batch.assemble import assemble
from slime_opd.batch.scores import columns_for_assembly
from slime_opd.batch.shares import plan_shares
from slime_opd.config import Config, parse
from slime_opd.objective.options import objective_options
from slime_opd.types import Prompt, RolloutBatch, Sample, Status

KINDS = {
    "one step, no score on the driver": "",
    "two steps, penalty, token weights": "--num-steps-per-rollout 2 --opd-token-weighting soft",
}


def make_config(flags: str, samples: int, ranks: int) -> Config:
    base = f"--hf-checkpoint MODEL --use-opd --opd-type megatron --opd-teacher-load TEACHER --num-rollout 1 --opd-kl-coef 1 --rollout-batch-size {samples // 8} --n-samples-per-prompt 8 --actor-num-gpus-per-node {ranks} --use-dynamic-batch-size --max-tokens-per-gpu 16384"
    return parse(f"{base} {flags}".split())


def make_samples(count: int, tokens: int) -> list[Sample]:
    random, samples = np.random.default_rng(0), []
    for index in range(count):
        length = int(random.integers(tokens // 2, tokens + 1))
        sample = Sample(Prompt(index // 8, (1,) * 256, ""), (1,) * length, "", Status.COMPLETED)
        sample.set("loss_mask", np.ones(length))
        sample.set("group", index // 8)
        sample.set("reward", float(index % 2))
        sample.set("rollout_log_probs", random.normal(-1, 0.1, length))
        samples.append(sample)
    return samples


def size(value: Any) -> int:
    """Bytes of all arrays in a nested value."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    if isinstance(value, list):
        return sum(map(size, value))
    samples = value.samples
    return size([samples.tokens, samples.prompt_lengths, samples.response_lengths, dict(samples.columns)])


def through_ray(shares: list[Any]) -> list[Any]:
    """The shares as other processes of this machine get them."""
    return [ray.get(ray.put(share)) for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="longest response")
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks")
    arguments = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    samples = make_samples(arguments.samples, arguments.tokens)
    total = sum(sample.response_length for sample in samples)
    print(f"{total:,} response tokens in {arguments.samples} samples, {arguments.ranks} data-parallel ranks")
    for name, flags in KINDS.items():
        measure(name, make_config(flags, arguments.samples, arguments.ranks), samples, total)


def measure(name: str, config: Config, samples: list[Sample], total: int) -> None:
    print(name)

    def part(label: str, call: Callable[[], Any], moved: bool = False) -> Any:
        started = time.perf_counter()
        value = call()
        seconds = time.perf_counter() - started
        moved_bytes = f"{size(value) / total:8.1f} bytes per token" if moved else ""
        print(f"  {label:34} {seconds / total * 1e6:8.3f} s per million tokens {moved_bytes}")
        return value

    batch = part("samples to columns", lambda: RolloutBatch.from_samples(samples))
    shares = part("plan", lambda: plan_shares(batch, config))
    part("shares to the ranks", lambda: through_ray(shares.batches(batch)), moved=True)
    random, names = np.random.default_rng(1), sorted(columns_for_assembly(config, objective_options(config, 0.0)))
    scored = {column: random.normal(-1, 0.1, total).astype(np.float32) for column in names}
    if names:
        returned = part("scores to the driver", lambda: through_ray(shares.split(scored)), moved=True)
        scored = part("joined", lambda: shares.join(returned))
    options = objective_options(config, 0.0)
    whole = part("assemble", lambda: assemble(batch.with_columns(scored), config, options))
    made = {column: values for column, values in whole.columns.items() if column not in batch.columns.keys() | scored}
    part("columns to the ranks", lambda: through_ray(shares.split(made)), moved=True)


if __name__ == "__main__":
    main()
