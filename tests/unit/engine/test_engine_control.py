"""The admin calls: what is sent, and that a server's no is an error."""

from __future__ import annotations

import base64
import json
import pickle

import httpx
import pytest
import torch

from slime_opd.engine import weight_proof
from slime_opd.engine.control import EngineControl
from slime_opd.errors import EngineError, EngineTimeout


def control(*responses: httpx.Response | Exception) -> tuple[EngineControl, list[tuple[str, dict]]]:
    seen: list[tuple[str, dict]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content or b"{}")))
        response = responses[min(len(seen), len(responses)) - 1]
        if isinstance(response, Exception):
            raise response
        return httpx.Response(response.status_code, content=response.content)

    return EngineControl("http://engine:1/", transport=httpx.MockTransport(answer)), seen


DONE = httpx.Response(200, json={"success": True, "message": "Success"})

CALLS = {
    "/update_weights_from_tensor": lambda c: c.update_weights_from_tensor(["x"], weight_version="2"),
    "/update_weights_from_disk": lambda c: c.update_weights_from_disk("/m", weight_version="2"),
    "/update_weight_version": lambda c: c.set_weight_version("2"),
    "/init_weights_update_group": lambda c: c.init_weights_update_group(
        master_address="h", master_port=5, rank_offset=1, world_size=2, group_name="g", backend="gloo"
    ),
    "/update_weights_from_distributed": lambda c: c.update_weights_from_distributed(
        names=["a"], dtypes=["float32"], shapes=[torch.Size([2, 3])], group_name="g"
    ),
    "/destroy_weights_update_group": lambda c: c.destroy_weights_update_group("g"),
}


@pytest.mark.parametrize("path", CALLS)
def test_a_call_goes_to_its_path_and_a_refusal_is_an_error(path):
    asked, seen = control(DONE)
    CALLS[path](asked)
    assert [where for where, _ in seen] == [path]
    for refusal in (
        httpx.Response(200, json={"success": False, "message": "no such group"}),
        httpx.Response(400, json={"success": False, "message": "no such group"}),
    ):
        refused, _ = control(refusal)
        with pytest.raises(EngineError, match=f"http://engine:1{path}.*no such group"):
            CALLS[path](refused)


def test_a_server_that_died_or_is_silent_is_an_engine_error():
    gone, _ = control(httpx.ConnectError("refused"))
    with pytest.raises(EngineError, match="ConnectError: refused"):
        gone.set_weight_version("2")
    silent, _ = control(httpx.ReadTimeout("late"))
    with pytest.raises(EngineTimeout, match="no answer within 600 s"):
        silent.set_weight_version("2")


def test_shapes_and_names_travel_as_json():
    asked, seen = control(DONE)
    CALLS["/update_weights_from_distributed"](asked)
    body = seen[0][1]
    assert (body["names"], body["dtypes"], body["shapes"]) == (["a"], ["float32"], [[2, 3]])


def test_flushing_is_repeated_until_the_server_is_idle(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    busy, seen = control(httpx.Response(400, text="busy"), httpx.Response(400, text="busy"), httpx.Response(200))
    busy.flush_cache()
    assert [path for path, _ in seen] == ["/flush_cache"] * 3
    never, _ = control(httpx.Response(400, text="busy"))
    with pytest.raises(EngineTimeout, match="requests are running"):
        never.flush_cache(timeout_s=0.0)


def test_a_proof_begins_with_the_checksums_and_ends_with_the_names_that_are_wrong():
    begun, seen = control(DONE)
    begun.begin_weight_proof({"a": torch.tensor(-5), "b": torch.tensor(6)}, num_ranks=2)
    ((path, body),) = seen
    assert (path, body["load_format"], body["flush_cache"]) == (
        "/update_weights_from_tensor",
        weight_proof.LOADER,
        False,
    )
    for serialized in body["serialized_named_tensors"]:
        [(names, checksums)] = pickle.loads(base64.b64decode(serialized))
        assert (names, checksums.tolist()) == ("a\nb", [-5, 6])
    assert len(body["serialized_named_tensors"]) == 2

    none, some = (
        {"changed": [], "different": [], "missing": []},
        {"changed": ["b", "a"], "different": [], "missing": ["c"]},
    )
    for answer, expected in (
        (none, {}),
        (some, {"changed": ["a", "b"], "missing": ["c"]}),
        ([none, some], {"changed": ["a", "b"], "missing": ["c"]}),  # of two data-parallel replicas
    ):
        finished, seen = control(httpx.Response(200, json=answer))
        assert finished.finish_weight_proof() == expected
        assert seen == [("/get_weights_by_name", {"name": weight_proof.REPORT, "truncate_size": 0})]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            httpx.Response(400, json={"error": {"message": "Get parameter by name failed"}}),
            "Get parameter by name failed",
        ),
        (httpx.Response(200, json=[]), "expected a report of the weights"),
        (httpx.Response(200, json=[[0.5, 1.5]]), "expected a report of the weights"),
    ],
)
def test_a_server_without_a_report_has_proven_nothing(answer, message):
    unable, _ = control(answer)
    with pytest.raises(EngineError, match=message):
        unable.finish_weight_proof()
