"""Model families: a tiny random model of each, made by transformers, is the same model here at every parallel layout.

Hugging Face to Megatron: log-probs to 1e-4 in float32. Megatron to Hugging Face: bit for bit. A torch_dist checkpoint that one
process saved is loaded at TP=2 and PP=2, bit for bit.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks

pytestmark = pytest.mark.dist

SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Family: its transformers class, and what its published models have that the shape does not.
FAMILIES = {
    "Qwen2, Qwen2.5": ("Qwen2", {}),
    "Qwen2, Qwen2.5, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"head_dim": 32}),
    "Qwen3, tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "Llama 2": ("Llama", {}),
    "Llama 3.1": (
        "Llama",
        {"rope_theta": 5e5, "rope_scaling": LLAMA_3 | {"original_max_position_embeddings": 64}},
    ),
    "Llama 3.2, tied": (
        "Llama",
        {
            "rope_theta": 5e5,
            "rope_scaling": LLAMA_3 | {"factor": 32.0, "original_max_position_embeddings": 64},
            "tie_word_embeddings": True,
        },
    ),
    "Llama, linear scaling": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
}
LAYOUTS = {"one process": (1, 1), "TP=2": (2, 1), "PP=2": (1, 2)}
PROMPTS, RESPONSES = (5, 7), (75, 63)


def save_model(directory: Path, family: str) -> None:
    """A random model of the family, its biases too: a bias that is 0 would hide that it is lost."""
    import torch
    import transformers

    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.5)
    model.save_pretrained(directory)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 64, sum(PROMPTS) + sum(RESPONSES))


def make_config(model_dir: str, world: int, tensor: int, pipeline: int, ref_load: str | None = None):
    from slime_opd.config import stages
    from slime_opd.config.config import Config

    return Config(
        cluster=stages.ClusterConfig(actor_num_gpus_per_node=world),
        model=stages.ModelConfig(hf_checkpoint=model_dir, megatron_to_hf_mode="bridge"),
        checkpoint=stages.CheckpointConfig(ref_load=ref_load),
        parallel=stages.ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
        training=stages.TrainingConfig(global_batch_size=2, micro_batch_size=2, loss_type="sft_loss"),
        rollout=stages.RolloutConfig(rollout_batch_size=2, num_rollout=1),
    )


def on_rank(rank, world_size, init_method, models: str, tensor, pipeline):
    """Of every family: log-probs from the Hugging Face weights, and the weights as they are exported; those of torch_dist too."""
    from slime_opd.megatron import checkpoint, parallel
    from slime_opd.megatron.trainer import Trainer
    from slime_opd.types import RolloutBatch, TrainBatch

    found = {}
    for number, family in enumerate(FAMILIES):
        directory = f"{models}/{number}"

        def trainer_of(load: str | None, step: str, number: int = number, directory: str = directory) -> Trainer:
            config = make_config(directory, world_size, tensor, pipeline, load)
            return Trainer(config, rank=rank, world_size=world_size, init_method=f"{init_method}_{number}_{step}")

        trainer = trainer_of(None, "first")
        mask = {"loss_mask": np.ones(sum(RESPONSES), np.float32)}
        batch = TrainBatch(RolloutBatch(tokens(), np.array(PROMPTS), np.array(RESPONSES), mask), ((2,),))
        scores = trainer.score_pass(
            batch, lambda hidden, one, trainer=trainer: {"log_probs": trainer.scores(hidden, one, 1.0)[0]}
        )
        log_probs = scores["log_probs"].numpy() if scores else None
        exported = {name: weight.clone().numpy() for name, weight in trainer.exported_weights()}
        if world_size == 1:
            checkpoint.save(f"{directory}_torch_dist", None, trainer.model, None, {})
        parallel.shut_down()
        loaded = {name: weight.clone().numpy() for name, weight in trainer_of(f"{directory}_torch_dist", "second").exported_weights()}
        parallel.shut_down()
        found[family] = log_probs, exported, loaded
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for number, family in enumerate(FAMILIES):
        save_model(directory / str(number), family)
    return directory


@pytest.fixture(scope="module")
def outcomes(models, tmp_path_factory):
    rendezvous = tmp_path_factory.mktemp("rendezvous")
    return {
        layout: run_ranks(on_rank, tensor * pipeline, rendezvous, str(models), tensor, pipeline)
        for layout, (tensor, pipeline) in LAYOUTS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_hugging_faces(outcomes, models, family, layout):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / str(list(FAMILIES).index(family)), dtype=torch.float32)
    expected, start = [], 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.from_numpy(tokens()[start : start + prompt + response])
        start += prompt + response
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
        expected.append(log_probs[:-1].gather(1, ids[1:, None])[prompt - 1 :, 0])
    got = next(rank[family][0] for rank in outcomes[layout] if rank[family][0] is not None)
    np.testing.assert_allclose(got, torch.cat(expected).numpy(), atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_bit_for_bit_from_hugging_face_and_from_torch_dist(outcomes, models, family, layout):
    from safetensors.torch import load_file

    expected = load_file(models / str(list(FAMILIES).index(family)) / "model.safetensors")
    for rank in outcomes[layout]:
        for weights in rank[family][1:]:
            assert weights.keys() == expected.keys()
            for name, values in weights.items():
                np.testing.assert_array_equal(values, expected[name].numpy(), err_msg=name)


def refused(rank, world_size, init_method, model_dir):
    from slime_opd.errors import ConfigError
    from slime_opd.megatron.trainer import Trainer

    with pytest.raises(ConfigError) as refusal:
        Trainer(make_config(model_dir, 1, 1, 1), rank=rank, world_size=world_size, init_method=init_method)
    return str(refusal.value)


def test_a_rotary_scaling_that_megatron_has_no_place_for_is_refused(tmp_path, monkeypatch):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    monkeypatch.setitem(FAMILIES, "yarn", ("Llama", {"rope_scaling": scaling}))
    save_model(tmp_path / "model", "yarn")
    (rendezvous := tmp_path / "rendezvous").mkdir()
    message = run_ranks(refused, 1, rendezvous, str(tmp_path / "model"))[0]
    assert "rope_scaling of type 'yarn', expected linear, llama3 or none" in message


def test_the_docs_list_what_passes_here():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    listed = re.findall(r"^\| ([^|]+?) \| `(\w+)ForCausalLM` \|", text, re.M)
    assert listed == [(family, name) for family, (name, _) in FAMILIES.items()]
