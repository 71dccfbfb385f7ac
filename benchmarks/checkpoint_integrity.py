"""What believing a checkpoint only when whole costs: seconds per GB to hash at save, to sync, and to verify at load.

    python benchmarks/checkpoint_integrity.py [--gigabytes 2] [--ranks 2] [--directory DIR]

Each rank saves random tensors through Megatron-core, as a run does, then hashes its share, syncs, and verifies. With
enough memory the files are read from the page cache, so that hashing is measured and not the disk; `--drop-caches`
(root) reads from the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "dist"))
GB = 10**9
# Tensors of one rank; as many as files could hold in a run, so that they spread evenly.
TENSORS = 16


def measure(rank: int, world_size: int, init_method: str, directory: str, gigabytes: float, drop_caches: bool) -> dict:
    """Seconds of each part on this rank, and the bytes of the checkpoint."""
    import queue

    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from slime_opd.checkpoint.formats.verification import Verification, on_first_rank, write_manifest
    from slime_opd.checkpoint.location import Location
    from slime_opd.checkpoint.publish import publish
    from slime_opd.config.stages import ParallelConfig
    from slime_opd.model import parallel

    parallel.initialize(
        ParallelConfig(), rank=rank, world_size=world_size, init_method=init_method, seed=0, timeout_minutes=10
    )
    partial = Path(directory) / "iter_0000001.partial"
    rows = int(gigabytes * GB / world_size / TENSORS / 4 / 1024)
    state = {
        f"tensor{number}": ShardedTensor.from_rank_offsets(
            f"tensor{number}", torch.randn(rows, 1024), (0, rank, world_size)
        )
        for number in range(TENSORS)
    }
    # By part: seconds, and seconds of CPU of all ranks and their writers.
    seconds: dict[str, tuple[float, float]] = {}

    def timed(name: str, action) -> None:
        dist.barrier()
        started, busy = time.perf_counter(), sum(os.times()[:4])
        action()
        spent = torch.tensor(sum(os.times()[:4]) - busy)
        dist.all_reduce(spent)
        seconds[name] = (time.perf_counter() - started, float(spent))

    on_first_rank(lambda: partial.mkdir(parents=True))
    filesystem_async._results_queue = queue.SimpleQueue()
    timed("write", lambda: dist_checkpointing.save(state, str(partial)))
    timed("hash", lambda: write_manifest(partial))
    timed("sync and rename", lambda: on_first_rank(lambda: publish(partial)))
    if drop_caches and rank == 0:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    location = Location(Path(directory) / "iter_0000001", 1)
    timed("verify", lambda: Verification().require(location, "--load"))
    parallel.shut_down()
    return seconds | {"bytes": sum(path.stat().st_size for path in location.directory.iterdir())}


def main() -> None:
    """Measure, and print seconds and seconds per GB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint, in 10^9 bytes")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the work")
    parser.add_argument("--directory", default=None, help="where to write; default: a temporary directory")
    parser.add_argument(
        "--drop-caches", action="store_true", help="verify from the disk and not from memory (root only)"
    )
    options = parser.parse_args()
    from ranks import run_ranks

    directory = Path(tempfile.mkdtemp(dir=options.directory))
    (rendezvous := directory / "rendezvous").mkdir()
    saved = str(directory / "saved")
    try:
        ranks = run_ranks(measure, options.ranks, rendezvous, saved, options.gigabytes, options.drop_caches)
    finally:
        shutil.rmtree(directory)
    found = ranks[0]
    size = found.pop("bytes") / GB
    save = sum(found[name][0] for name in ("write", "hash", "sync and rename"))
    print(f"{size:.2f} GB, {options.ranks} ranks")
    for name, (seconds, busy) in found.items():
        share = "" if name == "verify" else f", {seconds / save:.0%} of the save"
        print(f"{name}: {seconds / size:.2f} s/GB, {busy / size:.2f} s/GB of CPU{share}")


if __name__ == "__main__":
    main()
