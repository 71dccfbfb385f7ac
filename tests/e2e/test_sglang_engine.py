"""The SGLang boundary against a real server: numbers, weights, and what happens when something dies."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from conftest import TINY_VOCABULARY, pickled, save_tiny_model, save_tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slime_opd.engine import weight_proof
from slime_opd.engine.client import EngineClient
from slime_opd.engine.control import EngineControl
from slime_opd.engine.ports import free_port
from slime_opd.engine.protocol import SamplingParams
from slime_opd.engine.router import RouterProcess
from slime_opd.engine.server import EngineProcess
from slime_opd.engine.top_k import parse_rows
from slime_opd.errors import EngineError, EngineTimeout, TeacherMismatch
from slime_opd.lifetimes.processes import processes_in_group
from slime_opd.teacher.fingerprint import distance, read
from slime_opd.teacher.probe import probe_teacher
from slime_opd.teacher.sglang import ScoreRequest, SGLangTeacher

pytestmark = pytest.mark.e2e

PROMPT = (3, 40, 5, 38, 12, 44)
TOKENS = (*PROMPT, 7, 63, 21, 9, 30, 1)


def hugging_face_log_probs(model_dir: Path, tokens: tuple[int, ...], temperature: float = 1.0) -> np.ndarray:
    """Log-prob of each token but the first, given those before it, float32."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        log_probs = (model(torch.tensor([tokens])).logits[0, :-1] / temperature).log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def ask(server: EngineProcess | RouterProcess, *calls, timeout_s: float = 60.0, retries: int = 0):
    """The results of `call(client)` for each of `calls`, asked at one time."""

    async def run():
        client = EngineClient(
            server.url, concurrency=16, timeout_s=timeout_s, retries=retries, vocabulary_size=len(TINY_VOCABULARY)
        )
        try:
            return await asyncio.gather(*(call(client) for call in calls))
        finally:
            await client.aclose()

    return asyncio.run(run())


def score(server: EngineProcess | RouterProcess) -> np.ndarray:
    return ask(server, lambda client: client.score(TOKENS, len(PROMPT)))[0]


@pytest.fixture
def other_weights(engine_server, tiny_model_dir, tmp_path):
    """Another model's directory; afterwards the server serves its own weights again."""
    save_tiny_model(tmp_path / "other", seed=1)
    yield tmp_path / "other"
    with EngineControl(engine_server.url) as control:
        control.update_weights_from_disk(str(tiny_model_dir), weight_version="first")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_generation_carries_the_models_log_probs_at_the_sampling_temperature(
    engine_server, tiny_model_dir, temperature
):
    sampling = SamplingParams(temperature, 1.0, -1, 12)
    generations = ask(engine_server, *[lambda client: client.generate(PROMPT, sampling)] * 8)
    assert len({generation.token_ids for generation in generations}) > 1
    for generation in generations:
        assert 1 <= len(generation.token_ids) <= 12
        # At the last allowed token, SGLang says "length" even of an end-of-sequence token.
        ended = generation.token_ids[-1] == 1 and len(generation.token_ids) < 12
        assert generation.finish_reason == ("stop" if ended else "length")
        expected = hugging_face_log_probs(tiny_model_dir, PROMPT + generation.token_ids, temperature)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(generation.log_probs, expected, atol=1e-4)


def test_temperature_zero_takes_the_most_likely_token_and_stop_conditions_end_it(engine_server, tiny_model_dir):
    greedy = SamplingParams(0.0, 1.0, -1, 8)
    [free] = ask(engine_server, lambda client: client.generate(PROMPT, greedy))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    ids = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=8)[0, len(PROMPT) :].tolist()
    assert list(free.token_ids) == ids
    stopping = SamplingParams(0.0, 1.0, -1, 8, stop_token_ids=(free.token_ids[2],))
    [stopped] = ask(engine_server, lambda client: client.generate(PROMPT, stopping))
    first = free.token_ids.index(free.token_ids[2])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"


def test_scores_are_the_models_log_probs_at_temperature_one(engine_server, tiny_model_dir):
    scores = score(engine_server)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, hugging_face_log_probs(tiny_model_dir, TOKENS)[len(PROMPT) - 1 :], atol=1e-4)


def test_top_k_and_candidates_are_the_models_log_probs(engine_server, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1).numpy()
    # Of every position: its likeliest ids, its least likely ones, and the first and last id of the vocabulary.
    order = np.argsort(-expected, axis=1)
    candidates = np.concatenate([order[:, :2], order[:, -2:], np.tile([0, 63], (len(order), 1))], axis=1)

    async def both(client):
        _, top = await client.score_top_k(TOKENS, len(PROMPT), 4)
        return top, await client.score_candidates(TOKENS, len(PROMPT), candidates.astype(np.int32), top)

    [(top, of_candidates)] = ask(engine_server, both)
    np.testing.assert_array_equal(top.ids, order[:, :4])
    np.testing.assert_allclose(top.log_probs, np.take_along_axis(expected, order[:, :4], 1), atol=1e-4)
    np.testing.assert_allclose(of_candidates, np.take_along_axis(expected, candidates, 1), atol=1e-4)


def test_a_generation_tells_its_most_likely_tokens(engine_server, tiny_model_dir):
    sampling = SamplingParams(0.6, 1.0, -1, 6)
    [generation] = ask(engine_server, lambda client: client.generate(PROMPT, sampling, 3))
    found = parse_rows(generation.top_rows, len(generation.token_ids), 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + generation.token_ids])).logits[0, len(PROMPT) - 1 : -1]
    np.testing.assert_array_equal(found.ids, logits.topk(3).indices)


def test_a_request_that_can_never_work_is_refused_at_once_with_the_servers_reason(engine_server):
    with pytest.raises(EngineError, match=r"HTTP 400.*top_p must be in") as caught:
        ask(engine_server, lambda client: client.generate(PROMPT, SamplingParams(1.0, 2.0, -1, 4)), retries=5)
    assert "attempts" not in str(caught.value)


def wrong_weights(control: EngineControl, weights: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> dict:
    """What is wrong where the server is to serve `weights` and is sent `sent`, which it serves afterwards."""
    control.begin_weight_proof({name: weight_proof.checksum(tensor) for name, tensor in weights.items()}, num_ranks=1)
    control.update_weights_from_tensor([pickled(sent)], flush_cache=False)
    return control.finish_weight_proof()


def test_weights_from_disk_are_served_and_proven(engine_server, tiny_model_dir, other_weights):
    own, other = load_file(tiny_model_dir / "model.safetensors"), load_file(other_weights / "model.safetensors")
    with EngineControl(engine_server.url) as control:
        assert wrong_weights(control, own, own) == {}
        control.update_weights_from_disk(str(other_weights), weight_version="other")
        assert wrong_weights(control, other, other) == {}
    expected = hugging_face_log_probs(other_weights, TOKENS)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(score(engine_server), expected, atol=1e-4)
    [generation] = ask(engine_server, lambda client: client.generate(PROMPT, SamplingParams(1.0, 1.0, -1, 2)))
    assert generation.weight_version == "other"


def test_one_changed_bit_in_one_fused_tensor_is_named(engine_server, tiny_model_dir, other_weights):
    own = load_file(tiny_model_dir / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    changed = own | {name: own[name].clone()}
    changed[name].view(torch.int32)[0, 0] ^= 1
    fused = ["model.layers.1.self_attn.qkv_proj.weight"]
    with EngineControl(engine_server.url) as control:
        # The server serves its own; then the changed ones, although the others were expected; then it is sent all but
        # one.
        assert wrong_weights(control, changed, changed) == {"changed": fused}
        assert wrong_weights(control, own, changed) == {"different": [name]}
        del changed[name]
        assert wrong_weights(control, own, changed) == {"missing": [name]}


def run_script(script: str, url: str, weights: Path, output: Path) -> str:
    """Run Python source as a process of its own; its output, which must not end in failure.

    The output goes to a file: a pipe stays open as long as torch's shared-memory manager, which lives as
    long as the engine.
    """
    with output.open("w") as log:
        command = [sys.executable, "-W", "ignore", "-c", script, url, str(weights)]
        run = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=120, check=False)
    assert run.returncode == 0, output.read_text()
    return output.read_text()


SENDER = """
import sys, torch
from safetensors.torch import load_file
from slime_opd.engine.cpu_launcher import prepare_process
prepare_process()
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from slime_opd.engine.control import EngineControl
from slime_opd.engine.weight_proof import checksum
tensors = list(load_file(sys.argv[2]).items())
bucket = FlattenedTensorBucket(named_tensors=tensors)
flat = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
with EngineControl(sys.argv[1]) as control:
    serialized = MultiprocessingSerializer.serialize(flat, output_str=True)
    control.update_weights_from_tensor([serialized], load_format="flattened_bucket", weight_version="shared")
    control.begin_weight_proof({name: checksum(tensor) for name, tensor in tensors}, num_ranks=1)
    control.update_weights_from_tensor([MultiprocessingSerializer.serialize(tensors, output_str=True)])
    print(control.finish_weight_proof())
"""


def test_weights_from_another_processes_shared_memory_are_served(engine_server, other_weights, tmp_path):
    output = run_script(SENDER, engine_server.url, other_weights / "model.safetensors", tmp_path / "output")
    assert output.strip().splitlines()[-1] == "{}"
    expected = hugging_face_log_probs(other_weights, TOKENS)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(score(engine_server), expected, atol=1e-4)


def test_weights_by_value_are_served(engine_server, other_weights):
    tensors = load_file(other_weights / "model.safetensors")
    with EngineControl(engine_server.url) as control:
        control.update_weights_from_tensor([pickled(tensors)], weight_version="value")
    expected = hugging_face_log_probs(other_weights, TOKENS)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(score(engine_server), expected, atol=1e-4)


BROADCASTER = """
import sys, torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world, default_pg_timeout
from concurrent.futures import ThreadPoolExecutor
from safetensors.torch import load_file
from slime_opd.engine.control import EngineControl
from slime_opd.engine.ports import free_port
url, path = sys.argv[1:]
name, port = "weights", free_port()
tensors = load_file(path)
with EngineControl(url, timeout_s=60) as control, ThreadPoolExecutor(1) as other:
    joining = other.submit(control.init_weights_update_group, master_address="127.0.0.1", master_port=port,
                           rank_offset=1, world_size=2, group_name=name, backend="gloo")
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False, timeout=default_pg_timeout)
    group, _ = _new_process_group_helper(2, 0, [], dist.Backend("gloo"), PrefixStore(name, store), group_name=name,
                                         timeout=default_pg_timeout)
    _world.pg_group_ranks[group] = {0: 0, 1: 1}
    joining.result()
    receiving = other.submit(control.update_weights_from_distributed, names=list(tensors),
                             dtypes=[str(t.dtype).removeprefix("torch.") for t in tensors.values()],
                             shapes=[list(t.shape) for t in tensors.values()], group_name=name, weight_version="broadcast")
    for tensor in tensors.values():
        dist.broadcast(tensor, src=0, group=group)
    receiving.result()
    control.destroy_weights_update_group(name)
"""


def test_weights_from_a_gloo_broadcast_are_served(engine_server, other_weights, tmp_path):
    run_script(BROADCASTER, engine_server.url, other_weights / "model.safetensors", tmp_path / "output")
    expected = hugging_face_log_probs(other_weights, TOKENS)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(score(engine_server), expected, atol=1e-4)


def test_a_refused_update_says_why(engine_server, tmp_path):
    with EngineControl(engine_server.url) as control, pytest.raises(EngineError, match="update_weights_from_disk"):
        control.update_weights_from_disk(str(tmp_path / "nowhere"))


def test_the_probe_finds_a_fitting_teacher_and_refuses_others(engine_server, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    [report] = ask(engine_server, lambda client: SGLangTeacher(client).probe(tokenizer, tiny_model_dir))
    assert (report.vocabulary_size, report.eos_ids, report.unchecked) == (64, (1,), ())
    assert report.checked_tokens > 55
    save_tiny_tokenizer(tmp_path, TINY_VOCABULARY[:40] + TINY_VOCABULARY[:39:-1])
    other = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(TeacherMismatch, match=r"id 40 is '-' to the teacher and '[$]' to the student"):
        ask(engine_server, lambda client: SGLangTeacher(client).probe(other, tiny_model_dir))
    with pytest.raises(TeacherMismatch, match="vocabulary of 64 tokens, the student of 80"):
        ask(engine_server, lambda client: probe_teacher(client, tokenizer, 80, {1}))
    with pytest.raises(TeacherMismatch, match=r"end-of-sequence ids \[7\]"):
        ask(engine_server, lambda client: probe_teacher(client, tokenizer, 64, {7}))
    score(engine_server)  # none of the questions harmed the server


def test_an_honest_teacher_passes_every_check_idle_and_under_load(engine_server, tiny_model_dir, other_weights):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    others = [TOKENS[:2] + tuple(range(2, 2 + length)) for length in range(1, 33)]

    async def twenty_readings(client):
        report = await SGLangTeacher(client, ScoreRequest(top_k=8)).probe(tokenizer, tiny_model_dir)
        fingerprint, distances = report.fingerprint, []
        for number in range(20):
            requests = [client.score(other, 2) for other in others] if number % 2 else []
            reading, *_ = await asyncio.gather(read(client, fingerprint.sequences, fingerprint.start), *requests)
            distances.append(distance(reading, fingerprint.log_probs))
        return report, distances

    [(report, distances)] = ask(engine_server, twenty_readings)
    assert report.unchecked == ()
    assert max(distances) < 1e-4 < report.fingerprint.tolerance  # float32: what is seen is rounding alone
    with EngineControl(engine_server.url) as control:
        control.update_weights_from_disk(str(other_weights), weight_version="other")

    async def another_model(client):
        fingerprint = report.fingerprint
        return distance(await read(client, fingerprint.sequences, fingerprint.start), fingerprint.log_probs)

    [changed] = ask(engine_server, another_model)
    assert changed > 10 * report.fingerprint.tolerance


def test_a_router_spreads_requests_over_its_engines(engine_server, tiny_model_dir, tmp_path):
    router = RouterProcess([engine_server.url], port=free_port(), log_path=tmp_path / "router.log")
    with router:
        router.wait_ready(60)
        scores = score(router)
    np.testing.assert_allclose(scores, hugging_face_log_probs(tiny_model_dir, TOKENS)[len(PROMPT) - 1 :], atol=1e-4)


def wait_until(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


OWNER = """
import sys, time
from pathlib import Path
from slime_opd.engine.server import EngineProcess
server = EngineProcess(sys.argv[1], port=int(sys.argv[2]), log_path=Path(sys.argv[3])).start()
print(server.pid, flush=True)
server.wait_ready(180)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_server_dies_with_its_killed_owner_and_a_waiting_client_learns_of_it_at_once(tiny_model_dir, tmp_path):
    port = free_port()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tiny_model_dir), str(port), str(tmp_path / "server.log")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        group = int(owner.stdout.readline())
        assert owner.stdout.readline().strip() == "ready", (tmp_path / "server.log").read_text()[-2000:]
        assert len(processes_in_group(group)) >= 3  # the server, its scheduler and its detokenizer

        httpx.post(f"http://127.0.0.1:{port}/pause_generation", json={"mode": "retract"}, timeout=60).raise_for_status()

        async def ask_while_the_owner_is_killed() -> float:
            client = EngineClient(f"http://127.0.0.1:{port}", concurrency=4, timeout_s=60, retries=0)
            requests = [asyncio.create_task(client.generate(PROMPT, SamplingParams(1.0, 1.0, -1, 9))) for _ in range(4)]
            answered, _ = await asyncio.wait(requests, timeout=0.5)
            assert not answered  # the engine is paused: all of them are in its queue
            owner.send_signal(signal.SIGKILL)
            start = time.monotonic()
            outcomes = await asyncio.gather(*requests, return_exceptions=True)
            elapsed = time.monotonic() - start
            await client.aclose()
            assert all(isinstance(outcome, EngineError) for outcome in outcomes), outcomes
            assert not any(isinstance(outcome, EngineTimeout) for outcome in outcomes), outcomes
            return elapsed

        assert asyncio.run(ask_while_the_owner_is_killed()) < 15
        assert wait_until(lambda: not processes_in_group(group), 10), processes_in_group(group)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path):
    server = EngineProcess(tmp_path / "no_model", port=free_port(), log_path=tmp_path / "server.log")
    with server, pytest.raises(EngineError, match="exited with code") as caught:
        server.wait_ready(120)
    assert not isinstance(caught.value, EngineTimeout)
    assert "no_model" in str(caught.value)
