"""A server process that this process owns: it is started, becomes ready, and ends with its owner.

The server has a session of its own, so that Ctrl-C and a closed terminal do not reach it before its owner has decided
what to do. `stop` ends its process group and nothing else. If the owner dies without calling `stop`, even by SIGKILL,
the owner's warden (slime_opd/lifetimes/) ends the server.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from slime_opd import lifetimes
from slime_opd.errors import EngineError, EngineTimeout
from slime_opd.lifetimes import processes

_LOG_LINES_IN_ERRORS = 15


class OwnedProcess:
    """One HTTP server with every process it starts. As a context manager it starts and stops the server.

    `name`: the server's name in error messages. `command`: its argv. `url`: its address. `ready_path`: the path that
    answers 200 once the server is ready. `log_path`: the file for its output. `environment`: variables that it has in
    addition to those of this process.
    """

    def __init__(
        self,
        *,
        name: str,
        command: Sequence[str],
        url: str,
        ready_path: str,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.url = url
        self.log_path = Path(log_path)
        self._ready_path = ready_path
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start the server without waiting for it."""
        if self._process is not None:
            raise EngineError(f"{self.name} was started already")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        lifetimes.own()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        """Process id of the server, which is also the id of its process group."""
        return self._started().pid

    def exit_code(self) -> int | None:
        """The server's exit code, negative for a signal; None while it runs."""
        return processes.exit_code(self._started())

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the server is ready.

        Raises EngineError with the end of its log as soon as it exits or has lost a process, EngineTimeout (and
        stops it) after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        pause = 0.05
        with httpx.Client(trust_env=False) as http:
            while True:
                is_ready = self._is_ready(http, min(5.0, timeout_s))
                code = self.exit_code()
                if code is None and (lost := self.lost_process()) is not None:
                    self.stop()
                    raise EngineError(self._with_log(f"{self.name} has lost a process while it started ({lost})"))
                if is_ready:
                    return
                if code is not None:
                    raise EngineError(self._with_log(f"{self.name} exited with code {code} before it was ready"))
                if time.monotonic() > deadline:
                    self.stop()
                    raise EngineTimeout(self._with_log(f"{self.name} was not ready within {timeout_s:g} s"))
                time.sleep(pause)
                pause = min(pause * 1.5, 1.0)

    def lost_process(self) -> str | None:
        """Name and id of a child process that the server needs and that has died; None if there is none."""
        return None

    def stop(self, grace_s: float = 2.0) -> None:
        """End the server and every process of its group: SIGTERM, and SIGKILL after `grace_s` seconds."""
        if self._process is not None:
            processes.end_group(self._process, grace_s)

    def last_log_lines(self, count: int = _LOG_LINES_IN_ERRORS) -> str:
        """The last lines of the server's output."""
        if not self.log_path.exists():
            return "(no output)"
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-count:]) or "(no output)"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EngineError(f"{self.name} was not started")
        return self._process

    def _is_ready(self, http: httpx.Client, timeout_s: float) -> bool:
        try:
            return http.get(f"{self.url}{self._ready_path}", timeout=timeout_s).is_success
        except httpx.TransportError:
            return False

    def _with_log(self, message: str) -> str:
        return f"{message}; the end of {self.log_path}:\n{self.last_log_lines()}"
