"""What an SGLang teacher costs per token, for each way to ask it for log-probs. Starts a server of a tiny model of its own.

    python benchmarks/teacher_wire.py [--candidates 16] [--vocabulary 4096] [--lengths 64 512] [--noise 0.02 0.05]

The candidates are the likeliest tokens of a student: the teacher's weights with `noise` of their size added. Every way's
numbers are compared with Hugging Face's. Bytes count requests and answers; computed tokens are those that the server's
cache did not have.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from slime_opd.engine import protocol, top_k
from slime_opd.engine.client import EngineClient
from slime_opd.engine.ports import free_port
from slime_opd.engine.protocol import meta_info
from slime_opd.engine.server import EngineProcess

PROMPT = 32


class Meter:
    """One way's requests for one response: their bytes, seconds and computed tokens."""

    def __init__(self, client: EngineClient) -> None:
        self._client, self._before, self._started = client, client.bytes_moved, time.perf_counter()
        self.computed = 0

    async def ask(self, payload: dict[str, Any]) -> Any:
        """The answer to `payload`, its computed tokens counted."""
        answer = await self._client.post_generate(payload)
        for one in answer if isinstance(answer, list) else [answer]:
            self.computed += meta_info(one)["prompt_tokens"] - meta_info(one)["cached_tokens"]
        return answer

    def read(self) -> np.ndarray:
        """Bytes, milliseconds and computed tokens so far."""
        milliseconds = 1e3 * (time.perf_counter() - self._started)
        return np.array([self._client.bytes_moved - self._before, milliseconds, self.computed])


Way = Callable[[Meter, list[int], np.ndarray], Coroutine[Any, Any, np.ndarray]]


async def sampled_only(meter: Meter, tokens: list[int], candidates: np.ndarray) -> np.ndarray:
    """The sampled tokens' log-probs alone: what the penalty needs."""
    protocol.parse_scores(await meter.ask(protocol.score_payload(tokens, PROMPT)), tokens, PROMPT)
    return np.full(candidates.shape, np.nan)


def teachers_top(times: int) -> Way:
    """The teacher's own top tokens, and what they know of the candidates."""

    async def way(meter: Meter, tokens: list[int], candidates: np.ndarray) -> np.ndarray:
        n = times * candidates.shape[1]
        answer = await meter.ask(protocol.score_payload(tokens, PROMPT, n))
        return top_k.lookup(candidates, top_k.parse_top_k(answer, len(candidates), n))

    return way


def top_then_missing(times: int) -> Way:
    """The teacher's own top tokens, then the candidates that were not among them."""

    async def way(meter: Meter, tokens: list[int], candidates: np.ndarray) -> np.ndarray:
        known = await teachers_top(times)(meter, tokens, candidates)
        segments = top_k.missing_segments(candidates, np.isnan(known))
        answers = await meter.ask(top_k.segments_payload(tokens, PROMPT, segments)) if segments else []
        return top_k.fill(known, candidates, segments, answers, tokens, PROMPT)

    return way


def segments_of(size: int | None) -> Way:
    """All candidates by list, in segments of `size` positions; None is one segment, and one request."""

    async def way(meter: Meter, tokens: list[int], candidates: np.ndarray) -> np.ndarray:
        length = len(candidates)
        if size is not None:  # the first request fills the server's cache
            await meter.ask(protocol.score_payload(tokens, PROMPT))
        starts = range(0, length, size or length)
        ends = [min(start + (size or length), length) for start in starts]
        segments = [top_k.Segment(a, b, np.unique(candidates[a:b])) for a, b in zip(starts, ends, strict=True)]
        answers = await meter.ask(top_k.segments_payload(tokens, PROMPT, segments))
        return top_k.fill(np.full(candidates.shape, np.nan), candidates, segments, answers, tokens, PROMPT)

    return way


WAYS: dict[str, Way] = {
    "sampled tokens alone": sampled_only,
    "teacher's top K": teachers_top(1),
    "one list of all candidates": segments_of(None),
    "lists of 64 positions": segments_of(64),
    "lists of 16 positions": segments_of(16),
    "lists of 4 positions": segments_of(4),
    "lists of 1 position": segments_of(1),
    "teacher's top K, then missing": top_then_missing(1),
    "teacher's top 2K, then missing (ours)": top_then_missing(2),
    "teacher's top 4K, then missing": top_then_missing(4),
}


def save_model(directory: Path, vocabulary: int) -> Qwen3ForCausalLM:
    """A random model of 64 dimensions whose distributions are about as peaked as a language model's."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=False,
        initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(torch.float32).eval()
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def noisy(directory: Path, noise: float) -> Qwen3ForCausalLM:
    """The student: the model at `directory` with noise of `noise` times each weight's standard deviation."""
    student = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.manual_seed(1)
    for weight in student.parameters():
        weight.add_(torch.randn_like(weight) * weight.std() * noise)
    return student


@torch.no_grad()
def log_probs(model: Qwen3ForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Of every id at every response position, [R, V]."""
    return model(torch.tensor([tokens])).logits[0, PROMPT - 1 : -1].log_softmax(-1)


async def measure(url: str, sizes: argparse.Namespace, teacher: Qwen3ForCausalLM, directory: Path) -> None:
    """Print a table for each length and noise."""
    client = EngineClient(url, concurrency=1, timeout_s=300, retries=0)
    random = np.random.default_rng(0)
    for noise in sizes.noise:
        student = noisy(directory, noise)
        for length in sizes.lengths:
            print(f"\nresponses of {length} tokens, {sizes.candidates} candidates, noise {noise}")
            ours = None
            for name, way in WAYS.items():
                totals, overlaps, missing = np.zeros(3), [], []
                for _ in range(sizes.repeats):
                    tokens = random.integers(2, sizes.vocabulary, PROMPT + length).tolist()
                    of_teacher, of_student = log_probs(teacher, tokens), log_probs(student, tokens)
                    candidates = of_student.topk(sizes.candidates).indices.numpy().astype(np.int32)
                    own = of_teacher.topk(sizes.candidates).indices.numpy()
                    overlaps.append((candidates[:, :, None] == own[:, None]).any(2).mean())
                    meter = Meter(client)
                    found = await way(meter, tokens, candidates)
                    totals += meter.read() / length / sizes.repeats
                    expected = np.take_along_axis(of_teacher.numpy(), candidates, axis=1)
                    missing.append(np.isnan(found).mean())
                    np.testing.assert_allclose(found[~np.isnan(found)], expected[~np.isnan(found)], atol=1e-4)
                if name.endswith("(ours)"):
                    ours = totals
                beside = (
                    ""
                    if ours is None
                    else f"  ours/this: bytes {ours[0] / totals[0]:.2f}, time {ours[1] / totals[1]:.2f}"
                )
                print(
                    f"{name:<38} {totals[0]:8.0f} bytes  {totals[1]:6.2f} ms  {totals[2]:5.2f} computed  "
                    f"overlap {np.mean(overlaps):.2f}  unknown {np.mean(missing):.3f}{beside}"
                )
    await client.aclose()


def main() -> None:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.02, 0.05])
    parser.add_argument("--repeats", type=int, default=4)
    sizes = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "teacher"
        teacher = save_model(directory, sizes.vocabulary)
        options: dict[str, tuple[str, ...]] = {"skip-tokenizer-init": ()}
        with EngineProcess(directory, port=free_port(), log_path=Path(name) / "log", options=options) as server:
            server.wait_ready(180)
            asyncio.run(measure(server.url, sizes, teacher, directory))


if __name__ == "__main__":
    main()
