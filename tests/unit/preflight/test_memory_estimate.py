"""The size of published models, and of what a layout holds of them."""

import pytest
from model_families import family_config
from model_scripts import MODELS, PARAMETERS, model_arguments

from slime_opd.config import parse
from slime_opd.preflight.memory_estimate import bytes_text, count_text, estimates, size_of, step_bytes

QWEN3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.stem)
def test_parameters_are_those_of_the_published_model(script):
    _, config = family_config(script.stem, parse(model_arguments(script)))
    assert size_of(config.to_dict()).total == pytest.approx(PARAMETERS[script.stem], rel=1e-3)


def test_nothing_is_made_of_what_a_config_does_not_tell():
    assert size_of({}) is None and size_of({"hidden_size": 64}) is None


def total(arguments: str, architecture: dict = QWEN3_8B) -> float:
    line = estimates(parse(arguments.split()), architecture, size_of(architecture))[0]
    return float(line.split("about ")[1].split(" GiB")[0])


BASE = "--bf16 --accumulate-allreduce-grads-in-fp32 --recompute-granularity full --max-tokens-per-gpu 16384"


def test_memory_is_of_the_layout():
    alone, tensor = total(BASE), total(f"{BASE} --tensor-model-parallel-size 2 --actor-num-gpus-per-node 2")
    # 8.19e9 parameters of 2 + 4 + 12 bytes are 137 GiB.
    # Without sequence parallelism every tensor-parallel rank keeps the layers' inputs whole.
    assert 137 < alone < 160 and alone / 2 < tensor < alone / 2 + 16384 * 4096 * 2 * 40 / 2**30
    assert total(
        f"{BASE} --tensor-model-parallel-size 2 --actor-num-gpus-per-node 2 --sequence-parallel"
    ) == pytest.approx(alone / 2, rel=0.02)
    sharded = total(f"{BASE} --actor-num-gpus-per-node 8")
    assert alone - sharded == pytest.approx(8.19 * 12 * 7 / 8 / 1.073741824, rel=0.01)


def test_experts_are_split_over_expert_parallel_ranks():
    mixture = QWEN3_8B | {"num_experts": 8, "moe_intermediate_size": 12288}
    alone = total(f"{BASE} --actor-num-gpus-per-node 8", mixture)
    split = total(f"{BASE} --actor-num-gpus-per-node 8 --expert-model-parallel-size 8", mixture)
    # 43.5e9 parameters of experts: 7/8 of their weights and gradients go; their optimizer was split over the ranks
    # already.
    assert alone - split == pytest.approx(36 * 8 * 3 * 4096 * 12288 * 6 * 7 / 8 / 2**30, rel=0.01)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 MiB"), (300_000, "0.3 MiB"), (12 * 2**20, "12 MiB"), (2**30, "1.0 GiB"), (1500 * 2**30, "1,500.0 GiB")],
)
def test_bytes_are_given_in_the_unit_that_shows_them(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize(("count", "text"), [(340_000, "0.3M"), (35_000_000, "35M"), (8_190_735_360, "8.19B")])
def test_parameters_are_given_in_the_unit_that_shows_them(count, text):
    assert count_text(count) == text


def test_options_that_the_estimate_ignores_are_named():
    config = parse(["--optimizer-cpu-offload", "--exp-avg-dtype", "bf16", "--rollout-max-response-len", "64"])
    (line, _) = estimates(config, QWEN3_8B, size_of(QWEN3_8B))
    assert line.endswith("; without what --optimizer-cpu-offload, --exp-avg-dtype changes")


def test_a_sample_longer_than_a_micro_batch_is_one_of_its_own():
    def activations(*arguments: str) -> float:
        packed = ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "64", *arguments]
        return step_bytes(parse(packed), QWEN3_8B, size_of(QWEN3_8B))["activations"]

    assert activations("--rollout-max-response-len", "128") == pytest.approx(
        2 * activations("--rollout-max-response-len", "64")
    )
