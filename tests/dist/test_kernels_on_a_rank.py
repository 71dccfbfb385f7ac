"""A trainer on a machine that it believes to have a GPU and no Transformer Engine says which layers it has, and trains with them."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from rollouts import train_assembled
from test_layouts import make_batch, make_config

pytestmark = pytest.mark.dist


def start_and_step(rank, world_size, init_method, model_dir):
    from slime_opd.config.kernels import Machine
    from slime_opd.model import builder as model, parallel
    from slime_opd.model import parallel, transformer_config
    from slime_opd.trainer.trainer import Trainer
    from slime_opd.metrics import values

    found = []
    for number, machine in enumerate((Machine(), Machine(has_cuda=True, compute_capability=(9, 0)))):
        transformer_config.machine.of_this_process = lambda machine=machine: machine
        config = make_config(model_dir, 1, 1, 1, opd_type="sglang")
        trainer = Trainer(config, rank=rank, world_size=world_size, init_method=f"{init_method}_{number}")
        loss = values(train_assembled(trainer, make_batch()))["train/loss"]
        found.append((trainer.start_report.warnings, loss))
        parallel.shut_down()
    return found


def test_a_trainer_without_transformer_engine_says_so_at_its_start(tiny_model_dir, tmp_path):
    (((quiet, expected), (warnings, loss)),) = run_ranks(start_and_step, 1, tmp_path, str(tiny_model_dir))
    assert not any("Transformer Engine" in warning for warning in quiet)
    (said,) = (warning for warning in warnings if "Transformer Engine" in warning)
    assert said.startswith("Transformer Engine is not installed here: layers are Megatron-core's own")
    assert loss == pytest.approx(expected, rel=1e-6)
