"""Rules about sizes that this machine cannot hold: samples of a rollout, processes without GPUs."""

from __future__ import annotations

import os
from pathlib import Path

from slime_opd.config.config import Config

# Bytes that a token of a rollout takes on the driver, and a sample beside them: at the least, ids, mask and log-probs.
_BYTES_PER_TOKEN, _BYTES_PER_SAMPLE = 20, 500

# Most training processes and engines per core of a machine without GPUs; a few fit on any machine.
_PROCESSES_PER_CORE, _FEW_PROCESSES = 4, 8


def check_rollout_fits(config: Config) -> list[str]:
    """A rollout that the driver's memory cannot hold, whatever its engines do."""
    samples = config.samples_per_rollout
    needed = samples * (_BYTES_PER_SAMPLE + _BYTES_PER_TOKEN * (config.rollout.rollout_max_response_len or 0))
    memory = _memory_bytes()
    if memory is None or needed <= memory:
        return []
    return [
        f"--rollout-batch-size {config.rollout.rollout_batch_size} and --n-samples-per-prompt {config.rollout.n_samples_per_prompt}: the {samples:,} samples of a rollout take {needed >> 30:,} GiB on the driver with responses of --rollout-max-response-len, and this machine has {memory >> 30:,}; lower them"
    ]


def check_processes(config: Config) -> list[str]:
    """More processes than a machine without GPUs can run, where the run starts its own Ray there."""
    if config.cluster.ray_address != "local" or any(Path("/dev").glob("nvidia[0-9]*")):
        return []
    engines = config.num_engines * config.cluster.rollout_num_gpus_per_engine if config.needs_engines else 0
    problem = process_problem(config.world_size, engines, _cores())
    return [problem] if problem else []


def process_problem(trainers: int, engines: int, cores: int) -> str | None:
    """Why so many processes are too many for CPU cores; None if they are not. `engines` counts their ranks."""
    if trainers + engines <= max(_FEW_PROCESSES, _PROCESSES_PER_CORE * cores):
        return None
    return (
        f"{trainers:,} training processes and {engines:,} of engines (--actor-num-nodes × --actor-num-gpus-per-node, --rollout-num-gpus) "
        f"are too many for {cores} CPU cores, and there is no GPU; lower them, or start Ray with `ray start --head --num-cpus N` and join it with --ray-address auto"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    """Of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
