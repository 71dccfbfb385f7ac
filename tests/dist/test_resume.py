"""A resumed trainer has the present options, and a checkpoint becomes a Hugging Face directory during training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ranks import run_ranks
from rollouts import train_assembled
from test_layouts import make_batch, make_config

pytestmark = pytest.mark.dist

SAVED = {"lr": 1e-3, "min_lr": 0.0, "lr_decay_style": "linear", "lr_decay_iters": 10}
CHANGED = {"lr": 4e-3, "min_lr": 2e-3, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_eps": 1e-5, "weight_decay": 0.3}


def make_trainer(config, init_method, optimizer: dict, **checkpoint):
    from slime_opd.trainer.trainer import Trainer

    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
        checkpoint=dataclasses.replace(config.checkpoint, **checkpoint),
    )
    return Trainer(config, rank=0, world_size=1, init_method=init_method)


def step_of(trainer) -> dict[str, float]:
    from slime_opd.metrics import values
    from slime_opd.metrics import values

    return values(train_assembled(trainer, make_batch()))


def save_and_resume(rank, world_size, init_method, model_dir, directory):
    """Two steps are saved, one more is taken; then resumed with other options, and with a schedule of the saved ones."""
    from slime_opd.model import parallel

    config = make_config(model_dir, 1, 1, 1, opd_type="sglang")
    save, hf = f"{directory}/save", f"{directory}/hf/step_2"
    trainer = make_trainer(config, init_method, SAVED, save=save)
    steps = [step_of(trainer), step_of(trainer)]
    checkpoint = trainer.save(2, {"step": 2})
    trainer.save_hugging_face(str(checkpoint), hf)
    exported = {name: tensor.clone().numpy() for name, tensor in trainer.exported_weights()}
    steps.append(step_of(trainer))
    parallel.shut_down()

    same = step_of(make_trainer(config, f"{init_method}_same", SAVED, load=str(checkpoint)))
    parallel.shut_down()
    changed = make_trainer(config, f"{init_method}_changed", {**SAVED, **CHANGED}, load=str(checkpoint))
    groups = [{**group, "params": None} for group in changed.optimizer.param_groups]
    found = {"changed": step_of(changed), "num_steps": changed.scheduler.num_steps}
    parallel.shut_down()
    weights_alone = make_trainer(config, f"{init_method}_fresh", SAVED, load=str(checkpoint), no_load_optim=True)
    fresh = step_of(weights_alone)
    parallel.shut_down()
    return {**found, "fresh": fresh, "steps": steps, "same": same, "groups": groups, "exported": exported}


@pytest.fixture(scope="module")
def outcome(tiny_model_dir, tmp_path_factory) -> tuple[dict, Path]:
    directory = tmp_path_factory.mktemp("resumed")
    (found,) = run_ranks(save_and_resume, 1, tmp_path_factory.mktemp("meet"), str(tiny_model_dir), str(directory))
    return found, directory


def test_with_the_same_options_the_resumed_step_is_the_interrupted_one(outcome):
    found, _ = outcome
    for metric in ("train/lr", "train/loss", "train/grad_norm"):
        assert found["same"][metric] == pytest.approx(found["steps"][2][metric], rel=1e-5)


def test_the_schedule_keeps_its_position_and_takes_the_present_learning_rates(outcome):
    found, _ = outcome
    # Linear from lr to min_lr over 10 steps, of which two are done.
    assert [step["train/lr"] for step in found["steps"]] == pytest.approx([1e-3, 0.9e-3, 0.8e-3])
    assert found["changed"]["train/lr"] == pytest.approx(2e-3 + 0.8 * (4e-3 - 2e-3))
    assert found["num_steps"] == 3


def test_a_fresh_optimizer_state_starts_at_the_position_of_the_schedule(outcome):
    found, _ = outcome
    assert found["fresh"]["train/lr"] == pytest.approx(0.8e-3)


def test_adam_has_the_present_settings(outcome):
    found, _ = outcome
    for group in found["groups"]:
        assert tuple(group["betas"]) == (0.7, 0.8)
        assert group["eps"] == 1e-5
        assert group["weight_decay"] == pytest.approx(0.3 * group["wd_mult"])
        assert (group["max_lr"], group["min_lr"]) == (4e-3, 2e-3)
    # Norms and biases have none.
    assert {group["wd_mult"] for group in found["groups"]} == {0.0, 1.0}


def test_the_hugging_face_directory_has_the_weights_of_the_checkpoint_bit_for_bit(outcome):
    import numpy as np
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found, directory = outcome
    hf = directory / "hf" / "step_2"
    written = load_file(hf / "model.safetensors")
    assert written.keys() == found["exported"].keys()
    for name, values in found["exported"].items():
        np.testing.assert_array_equal(written[name], values, err_msg=name)
    assert (hf / "manifest.sha256").is_file()
    assert sorted(path.name for path in hf.parent.iterdir()) == ["step_2"], "nothing unfinished is left"
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), found["exported"]["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(hf)("1+1").input_ids
