"""Fixtures that several rooms share: a tiny Hugging Face model, and one real SGLang server of it."""

from __future__ import annotations

import base64
import gc
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# A test may make this process the owner of a scope (slime_opd/lifetimes/), whose temporary directory goes with it.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())


E2E = "tests/e2e/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With pytest-xdist a file's tests share a worker, since they share its fixtures, and so do all of tests/e2e."""
    from xdist.scheduler import LoadFileScheduling

    class OneRealStackAtATime(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return E2E if nodeid.startswith(E2E) else super()._split_scope(nodeid)

    return OneRealStackAtATime(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist, run tests/e2e first: it takes as long as all others together, and waits where they compute."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(E2E))


def pytest_sessionstart() -> None:
    """Import the tests and their libraries without the garbage collector."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the collector pass over what was imported: while the tests run it would walk all of it again and again."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Undo it before the process ends: libraries look for leaks then."""
    gc.unfreeze()


# One character, one token; 64 of them, so that the tokenizer fills the model's vocabulary.
TINY_VOCABULARY = ("<pad>", "<eos>", *"0123456789", *"abcdefghijklmnopqrstuvwxyz", *" +-*/=()?.,:;!'\"\n#%&<>@_|$")


def save_tiny_tokenizer(directory: Path, vocabulary: tuple[str, ...] = TINY_VOCABULARY) -> None:
    """A character-level tokenizer whose ids are the places in `vocabulary`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", model_max_length=512
    )
    fast.save_pretrained(directory)


def save_tiny_model(directory: Path, *, seed: int = 0, vocab_size: int = 64, **overrides: object) -> None:
    """A random Qwen3 of 0.1M parameters in float32, with its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        # Ten times the usual, so that log-probs differ visibly between tokens.
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**shape, **overrides})).to(torch.float32)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(directory)
    save_tiny_tokenizer(directory)


def pickled(tensors: dict[str, object]) -> str:
    """Tensors by value, as one rank's argument of `EngineControl.update_weights_from_tensor`."""
    return base64.b64encode(pickle.dumps(list(tensors.items()))).decode()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: vocabulary 64, 2 layers, hidden 64, untied, with a tokenizer of its 64 characters."""
    directory = tmp_path_factory.mktemp("tiny_model")
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def engine_server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """An `EngineProcess` that serves `tiny_model_dir`, ready; a test that changes its weights puts them back."""
    from slime_opd.engine.ports import free_port
    from slime_opd.engine.server import EngineProcess

    log_path = tmp_path_factory.mktemp("engine_server") / "server.log"
    with EngineProcess(tiny_model_dir, port=free_port(), log_path=log_path) as server:
        server.wait_ready(180)
        yield server
