"""Whatever combination of Megatron's flags passes the checks, model, gradient buffers and optimizer can be built with it.

Models of several ranks are built on meta tensors, one rank of four at a time, with torch's process group that sends nothing; those
of one process with everything that trains them.
"""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from model_families import FAMILIES, MIXTURES, save_config, save_model
from ranks import run_ranks
from rollouts import train_assembled

pytestmark = pytest.mark.dist

RANKS = 4
EXAMPLES = 16
# Options of this package that go to Megatron, and values to draw from.
OURS = {
    "--sequence-parallel": [""],
    "--recompute-granularity": ["full --recompute-method uniform --recompute-num-layers 1",
                                "full --recompute-method block --recompute-num-layers 3", "selective", "full"],
    "--recompute-granularity selective --recompute-modules": [
        "core_attn", "mlp", "moe shared_experts", "layernorm", "moe_act", "mla_up_proj core_attn"],
    "--bf16": [""], "--fp16": [""], "--fp32": [""],
    "--attention-backend": ["auto", "local"],
    "--accumulate-allreduce-grads-in-fp32": [""],
    "--attention-dropout": ["0", "0.1"],
    "--moe-router-load-balancing-type": ["none", "seq_aux_loss", "aux_loss seq_aux_loss"],
    "--moe-aux-loss-coeff": ["0", "0 0", "0.1"],
    "--moe-token-dispatcher-type": ["alltoall", "flex", "allgather"],
    "--overlap-grad-reduce --overlap-param-gather --bucket-size": ["1000", "0"],
    "--fp16 --initial-loss-scale": ["1024", "0.5"],
}  # fmt: skip


def argument_lists(families: list[str], directory: str) -> Any:
    """Command lines: a family in bridge mode, a layout, and up to five options that are not refused whatever their value."""
    from hypothesis import strategies as st

    from slime_opd.config.config import Config
    from slime_opd.config.megatron_support import SUPPORT, Answer
    from slime_opd.config.options import options_of

    def values_of(option) -> list[str]:
        if option.declaration.metavar:
            return ["1", "[0]*1+[1]*1"]
        if option.choices:
            return list(option.choices)
        return {bool: ["true", "false"], int: ["0", "1", "2", "-1"], float: ["0", "0.5", "8"], str: ["word"]}[option.kind]

    drawn = {
        option.flag: values_of(option)
        for name, option in options_of(Config).items()
        if name in SUPPORT and SUPPORT[name].answer in (Answer.WORKS, Answer.ACCEPTED, Answer.MODEL) and f"--{name}" not in OURS
    } | OURS
    choices = st.sampled_from([(flag, value) for flag, values in drawn.items() for value in values])

    @st.composite
    def command(draw) -> str:
        family = draw(st.sampled_from(families))
        is_mixture = FAMILIES[family][0] in MIXTURES
        tensor, pipeline, expert = draw(
            st.sampled_from([(1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), *([(1, 1, 2), (2, 1, 2)] if is_mixture else [])])
        )
        needed = "--sequence-parallel " if is_mixture and tensor > 1 else ""
        chosen = draw(st.lists(choices, max_size=5, unique_by=lambda pair: pair[0]))
        return (
            f"--hf-checkpoint {directory}/{families.index(family)} --megatron-to-hf-mode bridge --tensor-model-parallel-size {tensor} "
            f"--pipeline-model-parallel-size {pipeline} --expert-model-parallel-size {expert} {needed}"
            + " ".join(f"{flag} {value}" for flag, value in chosen)
        )

    return command()


def build_on_meta(config: Any, rank: int) -> None:
    """One rank's model on meta tensors."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from slime_opd.model import device, parallel
    from slime_opd.model.bridge import make_bridge
    from slime_opd.model.builder import build_model

    device.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        layout = config.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        build_model(config, make_bridge(config), on_meta=True)
    finally:
        parallel.shut_down()


def build_one_process(config: Any) -> None:
    """The model of a run of one process, its gradient buffers, its optimizer and its schedule."""
    from slime_opd.model import parallel
    from slime_opd.model.bridge import make_bridge
    from slime_opd.model.builder import build_model
    from slime_opd.trainer import optimizer

    with parallel.tool_process(config.parallel):
        wrapped = optimizer.wrap(config, build_model(config, make_bridge(config)))
        optimizer.make_scheduler(config, optimizer.make_optimizer(config, wrapped))


def build_everything(config: Any, rank: int) -> None:
    build_on_meta(config, rank)
    layout = config.parallel
    if layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.expert_model_parallel_size == 1:
        build_one_process(config)


# Commands that scripts give and that have to be accepted, by family.
ACCEPTED = {
    "Qwen3": "--sequence-parallel --no-masked-softmax-fusion --no-rope-fusion --no-gradient-accumulation-fusion",
    "Qwen3 MoE": "--moe-grouped-gemm --moe-token-drop-policy probs --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0",
}


def build_drawn(_rank, _world_size, _init_method, directory: str, base: str, examples: int) -> dict[str, int]:
    """Draw, check and build; returns how many were built and how many refused."""
    import warnings

    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from slime_opd.config import parse
    from slime_opd.preflight.rules import problems

    warnings.simplefilter("ignore")
    counts = {"built": 0, "refused": 0}

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(argument_lists(list(FAMILIES), directory), st.integers(0, RANKS - 1))
    def each(command: str, rank: int) -> None:
        config = parse(shlex.split(f"{base} {command}"))
        if problems(config):
            counts["refused"] += 1
        else:
            build_everything(config, rank)
            counts["built"] += 1

    for family, flags in ACCEPTED.items():
        place = f"--hf-checkpoint {directory}/{list(FAMILIES).index(family)} --megatron-to-hf-mode bridge"
        config = parse(shlex.split(f"{base} {place} {flags}"))
        assert problems(config) == []
        build_everything(config, 0)
    each()
    return counts


def test_what_passes_the_checks_can_be_built(tmp_path):
    for index, family in enumerate(FAMILIES):
        save_config(tmp_path / str(index), family)
    (data := tmp_path / "data.jsonl").write_text('{"input": "1+1", "label": "2"}\n')
    base = (
        f"--loss-type sft_loss --prompt-data {data} --label-key label --num-rollout 1 --rollout-batch-size 4 "
        f"--actor-num-gpus-per-node {RANKS}"
    )
    (rendezvous := tmp_path / "rendezvous").mkdir()
    (counts,) = run_ranks(build_drawn, 1, rendezvous, str(tmp_path), base, EXAMPLES)
    assert counts["built"] > EXAMPLES / 4, counts


def trained_weights(rank, world_size, init_method, models: list[str], cases: dict[str, str]) -> dict[str, dict]:
    """By case: the exported weights after two rollouts of two steps each."""
    from test_layouts import SAMPLES, make_batch

    from slime_opd.config import parse
    from slime_opd.model import parallel
    from slime_opd.trainer.trainer import Trainer

    found = {}
    for number, (case, flags) in enumerate(cases.items()):
        config = parse(
            shlex.split(
                f"--megatron-to-hf-mode bridge --num-rollout 3 --rollout-batch-size {SAMPLES} --global-batch-size {SAMPLES // 2} "
                f"--use-dynamic-batch-size --max-tokens-per-gpu 40 --lr 1e-3 --use-opd --opd-type sglang "
                f"--actor-num-gpus-per-node {world_size} {flags.format(*models)}"
            )
        )
        trainer = Trainer(config, rank=rank, world_size=world_size, init_method=f"{init_method}_{number}")
        for _ in range(2):
            train_assembled(trainer, make_batch())
        found[case] = {name: weight.float().clone().numpy() for name, weight in trainer.exported_weights()}
        parallel.shut_down()
    return found


ONE_RANK = {
    "bf16": "--hf-checkpoint {0} --bf16",
    "bf16, other flags": "--hf-checkpoint {0} --bf16 --recompute-granularity selective --recompute-modules core_attn mlp "
    "--loss-scale 8 --deterministic-mode",
    "mixture": "--hf-checkpoint {1}",
    "mixture, recomputed": "--hf-checkpoint {1} --recompute-granularity selective --recompute-modules moe shared_experts",
    "mixture, balanced": "--hf-checkpoint {1} --moe-router-bias-update-rate 0.01",
}
TWO_RANKS = {
    "plain": "--hf-checkpoint {0}",
    "overlapped": "--hf-checkpoint {0} --overlap-grad-reduce --overlap-param-gather --bucket-size 5000 --pad-buckets-for-high-nccl-busbw",
    "saved activations over both ranks": "--hf-checkpoint {0} --tensor-model-parallel-size 2 --recompute-granularity full "
    "--recompute-method uniform --recompute-num-layers 1 --distribute-saved-activations",
    "outputs of stages freed": "--hf-checkpoint {0} --pipeline-model-parallel-size 2 --deallocate-pipeline-outputs",
    # Megatron keeps this choice for the life of the process.
    "reduced by all-to-all": "--hf-checkpoint {0} --overlap-grad-reduce --bucket-size 5000 --reduce-scatter-with-fp32-accumulation",
}


@pytest.fixture(scope="module")
def trained(tiny_model_dir, tmp_path_factory) -> list[dict[str, dict]]:
    """The weights of every case, on one rank and on each of two."""
    save_model(mixture := tmp_path_factory.mktemp("mixture"), "GLM-4.5")
    models, rendezvous = [str(tiny_model_dir), str(mixture)], tmp_path_factory.mktemp("rendezvous")
    jobs = [(1, ONE_RANK), (2, TWO_RANKS)]
    return [weights for world, cases in jobs for weights in run_ranks(trained_weights, world, rendezvous, models, cases)]


def largest_difference(found: dict, expected: dict, ending: str = "") -> float:
    assert found.keys() == expected.keys()
    return max(float(abs(found[name] - expected[name]).max()) for name in expected if name.endswith(ending))


@pytest.mark.parametrize(("case", "base"), [("bf16, other flags", "bf16"), ("mixture, recomputed", "mixture")])
def test_recomputation_and_loss_scale_change_no_bit(trained, case, base):
    assert largest_difference(trained[0][case], trained[0][base]) == 0


def test_the_bias_of_a_router_moves_by_its_rate_and_is_exported(trained):
    plain, balanced = trained[0]["mixture"], trained[0]["mixture, balanced"]
    # Four steps, each up or down.
    assert largest_difference(balanced, plain, "e_score_correction_bias") == pytest.approx(0.04, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("case", [case for case in TWO_RANKS if case != "plain"])
def test_every_rank_exports_the_weights_of_the_plain_run(trained, rank, case):
    """Without the mends of --overlap-param-gather the output layer is not waited for, and a rank exports the other's old weights."""
    assert largest_difference(trained[rank][case], trained[rank]["plain"]) < 1e-4
