"""The cost per token of an SGLang teacher, for each way to request log-probs, on a server of a tiny model.

    python benchmarks/teacher_wire.py [--candidates 16] [--vocabulary 4096] [--lengths 64 512] [--noise 0.02 0.05]

The candidates are the top-k tokens of a student: the teacher's weights plus noise. All log-probs are compared with
Hugging Face's. Bytes are those of requests and responses; computed tokens are those that were not in the server's
prefix cache.
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
    """Bytes, time and computed tokens of the requests that score one response."""

    def __init__(self, client: EngineClient) -> None:
        self._client, self._before, self._started = client, client.bytes_moved, time.perf_counter()
        self.computed = 0

    async def post(self, payload: dict[str, Any]) -> Any:
        """Post `payload` and count the computed tokens; returns the server's response."""
        response = await self._client.post_generate(payload)
        for row in response if isinstance(response, list) else [response]:
            self.computed += meta_info(row)["prompt_tokens"] - meta_info(row)["cached_tokens"]
        return response

    def read(self) -> np.ndarray:
        """Bytes, milliseconds and computed tokens so far."""
        milliseconds = 1e3 * (time.perf_counter() - self._started)
        return np.array([self._client.bytes_moved - self._before, milliseconds, self.computed])


Request = Callable[[Meter, list[int], np.ndarray], Coroutine[Any, Any, np.ndarray]]


async def sampled_only(meter: Meter, tokens: list[int], candidates: np.ndarray) -> np.ndarray:
    """Score the sampled tokens only, as the penalty needs."""
    protocol.parse_scores(await meter.post(protocol.score_payload(tokens, PROMPT)), tokens, PROMPT)
    return np.full(candidates.shape, np.nan)


def teacher_top(times: int) -> Request:
    """Request the teacher's top `times` x K tokens; candidates that are not among them stay NaN."""

    async def request(meter: Meter, tokens: list[int], candidates: np.ndarray) -> np.ndarray:
        n = times * candidates.shape[1]
        response = await meter.post(protocol.score_payload(tokens, PROMPT, n))
        return top_k.lookup(candidates, top_k.parse_top_k(response, len(candidates), n))

    return request


def top_then_missing(times: int) -> Request:
    """Request the teacher's top tokens, then the candidates that were not among them."""

    async def request(meter: Meter, tokens: list[int], candidates: np.ndarray) -> np.ndarray:
        known = await teacher_top(times)(meter, tokens, candidates)
        segments = top_k.missing_segments(candidates, np.isnan(known))
        answers = await meter.post(top_k.segments_payload(tokens, PROMPT, segments)) if segments else []
        return top_k.fill(known, candidates, segments, answers, tokens, PROMPT)

    return request


def segments_of(size: int | None) -> Request:
    """Request all candidates by id, one list for each segment of `size` positions (None: one segment)."""

    async def request(meter: Meter, tokens: list[int], candidates: np.ndarray) -> np.ndarray:
        length = len(candidates)
        if size is not None:  # fills the server's prefix cache
            await meter.post(protocol.score_payload(tokens, PROMPT))
        starts = range(0, length, size or length)
        ends = [min(start + (size or length), length) for start in starts]
        segments = [top_k.Segment(a, b, np.unique(candidates[a:b])) for a, b in zip(starts, ends, strict=True)]
        answers = await meter.post(top_k.segments_payload(tokens, PROMPT, segments))
        return top_k.fill(np.full(candidates.shape, np.nan), candidates, segments, answers, tokens, PROMPT)

    return request


REQUESTS: dict[str, Request] = {
    "sampled tokens alone": sampled_only,
    "teacher's top K": teacher_top(1),
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
    """Save a random model of hidden size 64 whose distributions are about as peaked as a language model's."""
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
    """The student: the model at `directory` plus noise of `noise` standard deviations of each weight."""
    student = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.manual_seed(1)
    for weight in student.parameters():
        weight.add_(torch.randn_like(weight) * weight.std() * noise)
    return student


@torch.no_grad()
def log_probs(model: Qwen3ForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Log-probs of every token id at every response position, [response_length, vocabulary]."""
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
            for name, request in REQUESTS.items():
                totals, overlaps, missing = np.zeros(3), [], []
                for _ in range(sizes.repeats):
                    tokens = random.integers(2, sizes.vocabulary, PROMPT + length).tolist()
                    teacher_log_probs, student_log_probs = log_probs(teacher, tokens), log_probs(student, tokens)
                    candidates = student_log_probs.topk(sizes.candidates).indices.numpy().astype(np.int32)
                    own = teacher_log_probs.topk(sizes.candidates).indices.numpy()
                    overlaps.append((candidates[:, :, None] == own[:, None]).any(2).mean())
                    meter = Meter(client)
                    scores = await request(meter, tokens, candidates)
                    totals += meter.read() / length / sizes.repeats
                    expected = np.take_along_axis(teacher_log_probs.numpy(), candidates, axis=1)
                    known = ~np.isnan(scores)
                    missing.append(1 - known.mean())
                    np.testing.assert_allclose(scores[known], expected[known], atol=1e-4)
                if name.endswith("(ours)"):
                    ours = totals
                ratios = ""
                if ours is not None:
                    ratios = f"  ours/this: bytes {ours[0] / totals[0]:.2f}, time {ours[1] / totals[1]:.2f}"
                print(
                    f"{name:<38} {totals[0]:8.0f} bytes  {totals[1]:6.2f} ms  {totals[2]:5.2f} computed  "
                    f"overlap {np.mean(overlaps):.2f}  unknown {np.mean(missing):.3f}{ratios}"
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
