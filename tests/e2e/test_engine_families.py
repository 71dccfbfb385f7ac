"""An engine of every family that SGLang serves on a CPU: it has the model's log-probs, before and after an update of
its weights.
"""

from __future__ import annotations

import httpx
import pytest
import torch
from conftest import pickled, save_tiny_tokenizer
from model_families import FAMILIES, SERVED, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slime_opd.engine.control import EngineControl
from slime_opd.engine.ports import free_port
from slime_opd.engine.server import EngineProcess
from slime_opd.engine.weight_proof import checksum

pytestmark = pytest.mark.e2e

TOKENS = [3, 40, 5, 38, 12, 44, 7, 63, 21, 9, 30, 1]


def served(server: EngineProcess) -> torch.Tensor:
    request = {
        "input_ids": TOKENS,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = httpx.post(f"{server.url}/generate", json=request, timeout=60).json()
    return torch.tensor([row[0] for row in answer["meta_info"]["input_token_logprobs"]][1:])


def expected(directory) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        log_probs = model(torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


# test_sglang_engine.py has this of Qwen3, and test_training_run.py trains GLM-4.5 with it.
ELSEWHERE = {"Qwen3", "GLM-4.5"}


@pytest.mark.parametrize("family", [family for family in SERVED if family not in ELSEWHERE])
def test_the_engine_serves_the_weights_it_started_with_and_then_those_it_was_sent(family, tmp_path):
    assert family in FAMILIES
    for name in ("first", "second"):
        save_model(tmp_path / name, family)
        save_tiny_tokenizer(tmp_path / name)
    torch.manual_seed(1)
    moved = {
        name: weight + 0.05 * torch.randn_like(weight)
        for name, weight in load_file(tmp_path / "second" / "model.safetensors").items()
    }
    save_file(moved, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    with EngineProcess(tmp_path / "first", port=free_port(), log_path=tmp_path / "server.log") as server:
        server.wait_ready(180)
        torch.testing.assert_close(served(server), expected(tmp_path / "first"), atol=1e-5, rtol=0)
        with EngineControl(server.url) as control:
            control.update_weights_from_tensor([pickled(moved)], weight_version="second")
            control.begin_weight_proof({name: checksum(weight) for name, weight in moved.items()}, num_ranks=1)
            control.update_weights_from_tensor([pickled(moved)])
            assert control.finish_weight_proof() == {}
        torch.testing.assert_close(served(server), expected(tmp_path / "second"), atol=1e-5, rtol=0)
