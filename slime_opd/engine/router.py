"""SGLang's router as an owned process: one address for several engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from slime_opd.engine.ports import free_port
from slime_opd.engine.process import OwnedProcess
from slime_opd.engine.with_key import command_with_key, key_environment


class RouterProcess(OwnedProcess):
    """`python -m sglang_router.launch_router` in front of `worker_urls`.

    The circuit breaker and the router's own retries are off, because the client counts its attempts itself. `api_key`
    is the servers' key, which the router requires too.
    """

    def __init__(
        self,
        worker_urls: Sequence[str],
        *,
        host: str = "127.0.0.1",
        port: int,
        log_path: Path,
        api_key: str | None = None,
    ) -> None:
        command = [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", *worker_urls]
        command += ["--host", host, "--port", str(port), "--disable-retries", "--disable-circuit-breaker"]
        # By default every router serves its metrics at one fixed port, on all addresses: a second one could not start.
        command += ["--prometheus-host", host, "--prometheus-port", str(free_port(host))]
        super().__init__(
            name=f"the router of {len(worker_urls)} SGLang servers",
            command=command if api_key is None else command_with_key(command),
            url=f"http://{host}:{port}",
            ready_path="/readiness",  # /health answers before the router has a worker
            log_path=log_path,
            environment=key_environment(api_key),
        )
