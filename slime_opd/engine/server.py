"""SGLang servers as owned processes: `sglang.launch_server`, or the CPU launcher without CUDA."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import slime_opd
from slime_opd.config import machine
from slime_opd.engine.health import Worker, server_workers, worst_status
from slime_opd.engine.process import OwnedProcess
from slime_opd.engine.with_key import command_with_key, key_environment

# `weight_proof.LOADER`. The process that owns a server needs no torch, and to import it takes seconds of the start.
_WEIGHT_LOADER = "slime_opd.engine.weight_proof.begin"


def engine_command(
    model_path: str | Path, *, host: str, port: int, options: Mapping[str, tuple[str, ...]], has_cuda: bool
) -> list[str]:
    """The argv of an SGLang server.

    `options`: SGLang's own, without dashes: {"mem-fraction-static": ("0.7",), "disable-radix-cache": ()}.
    """
    module = "sglang.launch_server" if has_cuda else "slime_opd.engine.cpu_launcher"
    command = [sys.executable, "-m", module, "--model-path", str(model_path), "--host", host, "--port", str(port)]
    overrides = {name.lstrip("-").replace("_", "-"): values for name, values in options.items()}
    for name, values in ({"custom-weight-loader": (_WEIGHT_LOADER,)} | overrides).items():
        command += [f"--{name}", *values]
    return command


class EngineProcess(OwnedProcess):
    """One SGLang server of a Hugging Face model directory; it uses the GPUs that are visible to this process.

    With `api_key`, every request except a health check needs the key.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int,
        options: Mapping[str, tuple[str, ...]] | None = None,
        log_path: Path,
        api_key: str | None = None,
    ) -> None:
        command = engine_command(model_path, host=host, port=port, options=options or {}, has_cuda=machine.has_cuda())
        package_root = str(Path(slime_opd.__file__).parent.parent)
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        super().__init__(
            name=f"the SGLang server of {model_path}",
            command=command if api_key is None else command_with_key(command),
            url=f"http://{host}:{port}",
            ready_path="/health",
            log_path=log_path,
            # The server imports this package: the CPU launcher is in it.
            environment={"PYTHONPATH": os.pathsep.join(search_path), **key_environment(api_key)},
        )
        self._workers: dict[tuple[int, float], Worker] = {}

    def lost_process(self) -> str | None:
        """Name and id of a dead scheduler or detokenizer; the HTTP process outlives it, and may even answer."""
        self._workers |= {(worker.pid, worker.started): worker for worker in server_workers(self.pid)}
        status, names = worst_status(list(self._workers.values()))
        return names if status == "dead" else None
