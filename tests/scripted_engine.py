"""An SGLang server as far as weights are concerned: its paths, with a small model that fuses what it loads, in this
process.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from slime_opd.engine import weight_proof


class FusedModel(torch.nn.Module):
    """Loads q and k into one parameter, as an engine does."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.bfloat16), requires_grad=False)
        self.norm = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    def load_weights(self, named_tensors) -> None:
        for name, tensor in named_tensors:
            target = {"q": self.qk[:2], "k": self.qk[2:], "norm": self.norm}[name]
            target.copy_(tensor)


def weights(start: float = 0.0) -> dict[str, Tensor]:
    """What a FusedModel loads; no value is 0, which it has before."""
    values = torch.arange(1, 12) + start
    return {"q": values[:4].view(2, 2).bfloat16(), "k": values[4:8].view(2, 2).bfloat16(), "norm": values[8:].float()}


class ScriptedEngine:
    """A server with `models`, one for each of its ranks; a context manager.

    `reads_late`: it opens what it is sent, answers, and copies from it when its cache is flushed, after all was sent.
    `handle_pids`: by request, the processes whose memory it opened, in the order of its ranks.
    """

    def __init__(self, models: list[FusedModel] | None = None, *, reads_late: bool = False) -> None:
        self.models = models or [FusedModel()]
        self.paths: list[str] = []
        self.version: str | None = None
        self.handle_pids: list[list[int]] = []
        self._reads_late = reads_late
        self._pending: list[list[Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ScriptedEngine:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, path: str, body: dict[str, Any]) -> Any:
        self.paths.append(path)
        if path == "/update_weights_from_tensor":
            serialized = [base64.b64decode(handle) for handle in body["serialized_named_tensors"]]
            assert len(serialized) == len(self.models)
            opened = [pickle.load(io.BytesIO(one)) for one in serialized]
            if body["load_format"] == weight_proof.LOADER:
                for model, named_tensors in zip(self.models, opened, strict=True):
                    weight_proof.begin(model, named_tensors)
            else:
                assert body["load_format"] == "flattened_bucket"
                self.handle_pids.append([int(re.search(rb"/proc/(\d+)/fd", one)[1]) for one in serialized])
                self._pending.append(opened)
                if not self._reads_late:
                    self._load_pending()
        elif path == "/flush_cache":
            self._load_pending()
        elif path == "/update_weights_from_disk":
            for model in self.models:
                for file in sorted(Path(body["model_path"]).glob("*.safetensors")):
                    model.load_weights(load_file(file).items())
            self.version = body["weight_version"]
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/get_weights_by_name":
            # What SGLang's first rank answers is gathered from all of them.
            reports = [
                model.get_weights_by_name(body["name"], body["truncate_size"], tp_size=1) for model in self.models
            ]
            return {kind: sorted({name for report in reports for name in report[kind]}) for kind in reports[0]}
        return {"success": True, "message": ""}

    def _load_pending(self) -> None:
        for opened in self._pending:
            for model, bucket in zip(self.models, opened, strict=True):
                flat = bucket["flattened_tensor"]
                model.load_weights(
                    [
                        (part.name, flat[part.start_idx : part.end_idx].view(part.dtype).reshape(part.shape))
                        for part in bucket["metadata"]
                    ]
                )
        self._pending.clear()

    def _handler(engine) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                answer = json.dumps(engine._answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
