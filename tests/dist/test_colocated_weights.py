"""Weights from several trainer ranks: each engine rank opens the memory of the trainer rank that shares its GPU."""

from __future__ import annotations

import os

import pytest
from ranks import run_ranks
from scripted_engine import FusedModel, ScriptedEngine, weights

pytestmark = pytest.mark.dist


def on_rank(rank, world_size, init_method, urls: list[str], per_engine: int, is_wrong: bool):
    """Send weights, a bucket for each tensor; returns this process's id and the error, if any."""
    import torch.distributed as dist

    from slime_opd.config import stages
    from slime_opd.config.config import Config
    from slime_opd.errors import WeightSyncError
    from slime_opd.weights.update import WeightSender

    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    config = Config(
        cluster=stages.ClusterConfig(
            colocate=True,
            actor_num_gpus_per_node=world_size,
            rollout_num_gpus=len(urls) * per_engine,
            rollout_num_gpus_per_engine=per_engine,
        ),
        weights=stages.WeightsConfig(update_weight_buffer_size=1),
    )
    mine = weights(start=float(is_wrong and rank == 1))
    error = None
    try:
        sender = WeightSender(config, rank, urls)
        for version in (1,) if is_wrong else (1, 2):
            sender.send(lambda: iter(mine.items()), version, check=True)
    except WeightSyncError as caught:
        error = str(caught)
    dist.barrier()
    dist.destroy_process_group()
    return os.getpid(), error


def test_each_of_two_engines_opens_the_memory_of_its_own_trainer_rank(tmp_path):
    with ScriptedEngine(reads_late=True) as first, ScriptedEngine() as second:
        results = run_ranks(on_rank, 3, tmp_path, [first.url, second.url], 1, False)
        assert [error for _, error in results] == [None] * 3
        for engine, (pid, _) in zip((first, second), results, strict=False):
            # Two updates, each sent twice, of three buckets.
            assert engine.handle_pids == [[pid]] * 12
            assert engine.models[0].norm.equal(weights()["norm"]) and engine.version == "2"


def test_an_engine_of_two_ranks_takes_the_handles_of_both_trainer_ranks_in_one_request_in_their_order(tmp_path):
    with ScriptedEngine([FusedModel(), FusedModel()]) as engine:
        results = run_ranks(on_rank, 2, tmp_path, [engine.url], 2, False)
        assert [error for _, error in results] == [None] * 2
        assert engine.handle_pids == [[pid for pid, _ in results]] * 12
        assert all(model.norm.equal(weights()["norm"]) for model in engine.models)


def test_a_trainer_rank_that_sends_other_weights_than_the_first_fails_the_check(tmp_path):
    with ScriptedEngine() as first, ScriptedEngine() as second:
        results = run_ranks(on_rank, 2, tmp_path, [first.url, second.url], 1, True)
        assert results[1][1] is None
        assert f"{second.url} does not serve the trainer's weights: 3 weights arrived with other values" in results[0][1]
