"""Model families: a tiny random model of each, made by transformers, is the same model here at every parallel layout.

Hugging Face to Megatron: log-probs to 1e-4, and the norm of the gradient of a training step to 1e-4 relative, in float32; what is
left is the order of sums. Megatron to Hugging Face: bit for bit, from the ranks' memory and from the checkpoint that they save. The
torch_dist checkpoint that the tool makes of Hugging Face's is loaded at every layout, bit for bit.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from model_families import FAMILIES, MIXTURES, OF_TRANSFORMERS, SERVED, save_model
from ranks import run_ranks
from rollouts import log_probs_of, train_assembled

pytestmark = pytest.mark.dist

# Tensor, pipeline and expert parallelism, and whether sequences are split over the tensor-parallel ranks.
LAYOUTS = {
    "one process": (1, 1, 1, False),
    "TP=2": (2, 1, 1, False),
    "TP=2, sequence parallel": (2, 1, 1, True),
    "PP=2": (1, 2, 1, False),
    "EP=2": (1, 1, 2, False),
}
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
# An odd number of tokens in all, which sequence parallelism cannot halve.
PROMPTS, RESPONSES = (5, 7), (75, 62)


def runs(family: str, layout: str) -> bool:
    """Megatron trains mixtures at TP=2 with sequence parallelism only; others have no experts to share."""
    return layout != ("TP=2" if FAMILIES[family][0] in MIXTURES else "EP=2")


CASES = [(family, layout) for family in FAMILIES for layout in LAYOUTS if runs(family, layout)]


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 64, sum(PROMPTS) + sum(RESPONSES))


def make_config(model_dir: str, layout: str, load: str | None = None):
    from slime_opd.config import stages
    from slime_opd.config.config import Config

    tensor, pipeline, expert, sequence_parallel = LAYOUTS[layout]
    return Config(
        cluster=stages.ClusterConfig(actor_num_gpus_per_node=tensor * pipeline * expert),
        model=stages.ModelConfig(hf_checkpoint=model_dir, megatron_to_hf_mode="bridge"),
        checkpoint=stages.CheckpointConfig(ref_load=load),
        parallel=stages.ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            expert_model_parallel_size=expert,
            sequence_parallel=sequence_parallel,
        ),
        # One sample for each data-parallel rank, which is what EP=2 has two of.
        training=stages.TrainingConfig(global_batch_size=2, micro_batch_size=1, loss_type="sft_loss"),
        rollout=stages.RolloutConfig(rollout_batch_size=2, num_rollout=1),
    )


COLLECTIVES = ("all_gather_object", "broadcast_object_list", "all_gather", "broadcast", "scatter", "barrier")


@contextmanager
def counted_calls() -> Iterator[Counter]:
    """Counts the collectives, and the state dicts of models, that are called inside."""
    import torch.distributed as dist

    from slime_opd.model.hidden_states import HiddenStatesModel

    counts: Counter = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [*((dist, name) for name in COLLECTIVES), (HiddenStatesModel, "state_dict")]:

            def count(*arguments, name=name, function=getattr(owner, name), **options):
                counts[name] += 1
                return function(*arguments, **options)

            patch.setattr(owner, name, count)
        yield counts


def on_rank(rank, world_size, init_method, models: str, layout: str):
    """Of every family: log-probs, the norm of a step's gradient, and the weights: exported, saved and converted, converted and loaded."""
    import torch

    from slime_opd.checkpoint.publish import publish
    from slime_opd.checkpoint.formats import hf_to_torch_dist, torch_dist, torch_dist_to_hf
    from slime_opd.model import parallel
    from slime_opd.checkpoint.formats.load_hugging_face import load_hugging_face
    from slime_opd.checkpoint.formats.save import save
    from slime_opd.trainer.trainer import Trainer
    from slime_opd.metrics import values
    from slime_opd.types import RolloutBatch, TrainBatch

    total = sum(RESPONSES)
    columns = {"loss_mask": np.ones(total, np.float32), "policy_weights": np.full(total, 1 / total, np.float32)}
    samples = RolloutBatch(tokens(), np.array(PROMPTS), np.array(RESPONSES), columns)
    found = {}
    for number, family in enumerate(FAMILIES):
        if not runs(family, layout):
            continue
        directory = f"{models}/{number}"

        def trainer_of(load: str | None, step: str, number: int = number, directory: str = directory) -> Trainer:
            config = make_config(directory, layout, load)
            return Trainer(config, rank=rank, world_size=world_size, init_method=f"{init_method}_{number}_{step}")

        trainer = trainer_of(None, "first")
        log_probs = log_probs_of(trainer, TrainBatch(samples, ((2,),)))
        with counted_calls() as loading:
            load_hugging_face(trainer.model, trainer.bridge, directory, "--hf-checkpoint")
        with counted_calls() as first_export:
            exported = {name: weight.clone().numpy() for name, weight in trainer.exported_weights()}
        with counted_calls() as second_export:
            split_weights = sum(getattr(weight, "tensor_model_parallel", False) for weight in trainer.model.parameters())
            num_exported = sum(1 for _ in trainer.exported_weights())
        found["calls", family] = loading, first_export, second_export, split_weights, num_exported
        saved = save(f"{directory}_saved_{layout}", None, trainer.model, None, {})
        converted = {}
        if rank == 0:
            groups, _ = torch_dist_to_hf.trained_weights(torch_dist.Reader(saved), directory)
            converted = {name: weight.clone().numpy() for group in groups for name, weight in group.read().items()}
        if world_size == 1:
            (made := Path(f"{directory}_torch_dist/release.partial")).mkdir(parents=True)
            with torch.no_grad():
                hf_to_torch_dist.convert(trainer.config, made)
            publish(made)
        norm = values(train_assembled(trainer, samples)).get("train/grad_norm")
        parallel.shut_down()
        loaded = {name: weight.clone().numpy() for name, weight in trainer_of(f"{directory}_torch_dist", "second").exported_weights()}
        parallel.shut_down()
        found[family] = log_probs, norm, exported, loaded, *([converted] if rank == 0 else [])
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
        layout: run_ranks(on_rank, tensor * pipeline * expert, rendezvous, str(models), layout)
        for layout, (tensor, pipeline, expert, _) in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def hugging_face(models):
    """Of every family: log-probs of the response tokens, and the norm of the gradient of their mean."""
    import torch
    import transformers

    found = {}
    for number, (family, (name, _)) in enumerate(FAMILIES.items()):
        kind = getattr(transformers, f"{OF_TRANSFORMERS.get(name, name)}ForCausalLM")
        model = kind.from_pretrained(models / str(number), dtype=torch.float32)
        log_probs, start = [], 0
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            ids = torch.from_numpy(tokens()[start : start + prompt + response])
            start += prompt + response
            log_probs.append(model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[prompt - 1 :, 0])
        torch.cat(log_probs).mean().backward()
        gradients = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        found[family] = torch.cat(log_probs).detach().numpy(), torch.stack(gradients).sum().sqrt().item()
    return found


def has_log_probs(outcomes, expected, family, layout):
    got = next(rank[family][0] for rank in outcomes[layout] if rank[family][0] is not None)
    np.testing.assert_allclose(got, expected[family][0], atol=1e-4)


def has_gradient(outcomes, expected, family, layout):
    norms = [rank[family][1] for rank in outcomes[layout] if rank[family][1] is not None]
    assert norms and norms == pytest.approx([expected[family][1]] * len(norms), rel=1e-4)


def has_weights(outcomes, models, family, layout):
    from safetensors.torch import load_file

    expected = load_file(models / str(list(FAMILIES).index(family)) / "model.safetensors")
    for rank in outcomes[layout]:
        for weights in rank[family][2:]:
            assert weights.keys() == expected.keys()
            for name, values in weights.items():
                np.testing.assert_array_equal(values, expected[name].numpy(), err_msg=name)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_log_probs_are_hugging_faces(outcomes, hugging_face, family, layout):
    has_log_probs(outcomes, hugging_face, family, layout)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_gradient_of_a_step_is_hugging_faces(outcomes, hugging_face, family, layout):
    has_gradient(outcomes, hugging_face, family, layout)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_weights_come_back_bit_for_bit_from_hugging_face_and_from_torch_dist(outcomes, models, family, layout):
    has_weights(outcomes, models, family, layout)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_weights_are_loaded_without_communication_and_exported_with_that_of_tensors_alone(outcomes, family, layout):
    tensor, pipeline, expert, _ = LAYOUTS[layout]
    for rank in outcomes[layout]:
        loading, first, second, split_weights, num_exported = rank["calls", family]
        assert num_exported == len(rank[family][2])
        # One by mbridge for the names, one for the tensors.
        assert loading == {"state_dict": 2}
        # What the stages have is exchanged once.
        assert first["all_gather_object"] == (pipeline > 1) and second["all_gather_object"] == 0
        del first["state_dict"], first["all_gather_object"]
        assert {name: count for name, count in first.items() if count} == second
        if tensor == pipeline == expert == 1:
            assert not second
        if tensor > 1 and FAMILIES[family][0] not in MIXTURES:
            assert second == {"all_gather": split_weights}


def test_the_table_in_the_docs_is_of_these_results(outcomes, models, hugging_face):
    def result(family: str, layout: str) -> str:
        if (family, layout) not in CASES:
            return "–"
        try:
            has_log_probs(outcomes, hugging_face, family, layout)
            has_gradient(outcomes, hugging_face, family, layout)
            has_weights(outcomes, models, family, layout)
        except AssertionError:
            return "fails"
        return "passes"

    table = [f"| family | class | {' | '.join(LAYOUTS)} | SGLang |", "| --- " * (3 + len(LAYOUTS)) + "|"]
    for family, (name, _) in FAMILIES.items():
        results = [*(result(family, layout) for layout in LAYOUTS), "passes" if family in SERVED else "not run"]
        table.append(f"| {family} | `{name}ForCausalLM` | {' | '.join(results)} |")
    text = DOCS.read_text()
    before, rest = text.split("<!-- results -->\n")[0], text.split("<!-- end of results -->")[1]
    made = before + "\n".join(["<!-- results -->", *table, "<!-- end of results -->"]) + rest
    if os.environ.get("WRITE_DOCS"):
        DOCS.write_text(made)
    assert text == made, "docs/models.md is of other results: run this test with WRITE_DOCS=1 and read what changed"


def refused(rank, world_size, init_method, model_dir):
    from slime_opd.errors import ConfigError
    from slime_opd.trainer.trainer import Trainer

    with pytest.raises(ConfigError) as refusal:
        Trainer(make_config(model_dir, "one process"), rank=rank, world_size=world_size, init_method=init_method)
    return str(refusal.value)


def test_a_rotary_scaling_that_megatron_has_no_place_for_is_refused(tmp_path, monkeypatch):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    monkeypatch.setitem(FAMILIES, "yarn", ("Llama", {"rope_scaling": scaling}))
    save_model(tmp_path / "model", "yarn")
    (rendezvous := tmp_path / "rendezvous").mkdir()
    message = run_ranks(refused, 1, rendezvous, str(tmp_path / "model"))[0]
    assert "rope_scaling of type 'yarn', expected linear, llama3 or none" in message
