"""Admin calls of a trainer rank to an SGLang server: flush the cache, update the weights, verify them.

All calls are synchronous: they return when the server has finished, and raise EngineError with the server's message if
it fails.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
from torch import Tensor

from slime_opd.engine import weight_proof
from slime_opd.engine.address import Address
from slime_opd.errors import EngineError, EngineTimeout


class EngineControl:
    """Client of one SGLang server's admin calls. `timeout_s` bounds each call; `api_key`: the server's, or None."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 600.0,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        address = Address.parse(url.rstrip("/"), api_key)
        self.url = address.redacted_url
        self._http = httpx.Client(
            base_url=address.base_url, timeout=timeout_s, headers=address.headers, transport=transport, trust_env=False
        )

    def flush_cache(self, timeout_s: float = 60.0) -> None:
        """Drop cached prefixes. A server with requests in flight refuses; retried for `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        pause = 0.05
        while True:
            response = self._send("POST", "/flush_cache")
            if response.is_success:
                return
            if time.monotonic() > deadline:
                raise EngineTimeout(
                    f"{self.url}/flush_cache: refused for {timeout_s:g} s, because requests are running or waiting"
                )
            time.sleep(pause)
            pause = min(pause * 2, 1.0)

    def update_weights_from_tensor(
        self,
        serialized: Sequence[str],
        *,
        load_format: str | None = None,
        weight_version: str | None = None,
        flush_cache: bool = True,
    ) -> None:
        """Load tensors by their Hugging Face names.

        `serialized`: one base64 pickle per tensor-parallel rank of the engine, of a list of (name,
        tensor), or with `load_format` "flattened_bucket" of {"flattened_tensor", "metadata"}.
        """
        body = {"serialized_named_tensors": list(serialized), "load_format": load_format}
        self._command(
            "/update_weights_from_tensor", {**body, "weight_version": weight_version, "flush_cache": flush_cache}
        )

    def update_weights_from_disk(self, path: str, *, weight_version: str | None = None) -> None:
        """Load a Hugging Face directory that the server can read."""
        self._command("/update_weights_from_disk", {"model_path": path, "weight_version": weight_version})

    def set_weight_version(self, weight_version: str) -> None:
        """Set the label of the served weights; generations carry it."""
        self._command("/update_weight_version", {"new_version": weight_version, "abort_all_requests": False})

    def init_weights_update_group(
        self, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Have the engine join a process group whose rank 0, the trainer, listens at the master address.

        Returns when all ranks have joined, so the trainer must join concurrently, from another thread. The engine's
        ranks start at `rank_offset`, one per tensor-parallel rank.
        """
        self._command(
            "/init_weights_update_group",
            {
                "master_address": master_address,
                "master_port": master_port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
        )

    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None = None,
        flush_cache: bool = True,
        load_format: str | None = None,
    ) -> None:
        """Have the engine receive tensors that rank 0 of the group broadcasts, in this order.

        `dtypes` are torch's names ("bfloat16"). Returns when the tensors are loaded, so the broadcast must run
        concurrently, from another thread.
        """
        body = {"names": list(names), "dtypes": list(dtypes), "shapes": [list(shape) for shape in shapes]}
        options = {"weight_version": weight_version, "flush_cache": flush_cache, "load_format": load_format}
        self._command("/update_weights_from_distributed", {**body, **options, "group_name": group_name})

    def destroy_weights_update_group(self, group_name: str) -> None:
        """Have the engine leave a process group."""
        self._command("/destroy_weights_update_group", {"group_name": group_name})

    def begin_weight_proof(self, checksums: Mapping[str, Tensor], num_ranks: int) -> None:
        """Have the server record which tensors arrive from now on, and whether loading them changes its parameters.

        `checksums`: `weight_proof.checksum` of each expected tensor, by its Hugging Face name. `num_ranks`: number of
        the server's tensor-parallel ranks. The server must have been started with `--custom-weight-loader` set to
        `weight_proof.LOADER`, as EngineProcess does. See weight_proof.py.
        """
        tensors = pickle.dumps(weight_proof.expected_tensors(checksums), protocol=pickle.HIGHEST_PROTOCOL)
        expected = base64.b64encode(tensors).decode()
        self.update_weights_from_tensor([expected] * num_ranks, load_format=weight_proof.LOADER, flush_cache=False)

    def finish_weight_proof(self) -> dict[str, list[str]]:
        """Names of wrong tensors since `begin_weight_proof`, by kind; {} proves that it has the trainer's weights.

        `weight_proof.CHANGED`: parameters of the server that loading changed; `DIFFERENT`: tensors that arrived with
        another checksum than the trainer's; `MISSING`: tensors that did not arrive.
        """
        path = "/get_weights_by_name"
        answer = self._json(self._send("POST", path, {"name": weight_proof.REPORT, "truncate_size": 0}), path)
        # One report per data-parallel replica of the engine, or the report itself if there is one replica.
        reports = answer if isinstance(answer, list) else [answer]
        kinds = (weight_proof.CHANGED, weight_proof.DIFFERENT, weight_proof.MISSING)
        if not reports or not all(isinstance(report, dict) and set(report) == set(kinds) for report in reports):
            raise EngineError(f"{self.url}{path}: expected a report of the weights, found {str(answer)[:200]}")
        wrong = {kind: sorted({name for report in reports for name in report[kind]}) for kind in kinds}
        return {kind: names for kind, names in wrong.items() if names}

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _command(self, path: str, body: dict[str, Any]) -> None:
        response = self._send("POST", path, body)
        answer = self._json(response, path)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineError(f"{self.url}{path}: the server refused: {answer.get('message')}")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise EngineTimeout(f"{self.url}{path}: no answer within {self._http.timeout.read:g} s") from error
        except httpx.TransportError as error:
            raise EngineError(f"{self.url}{path}: {type(error).__name__}: {error}".rstrip(": ")) from error

    def _json(self, response: httpx.Response, path: str) -> Any:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.is_success:
            return answer
        reason = answer.get("message") if isinstance(answer, dict) else None
        raise EngineError(f"{self.url}{path}: HTTP {response.status_code}: {reason or response.text[:500]}")
