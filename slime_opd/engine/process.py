"""A server process that this process owns: it starts, becomes ready, and dies with its owner.

The server runs in a session of its own, so that Ctrl-C and a closed terminal do not reach it before its
owner has decided what to do. `stop` ends exactly its process group. When the owner dies without
calling `stop`, even by SIGKILL, its warden (`lifetimes.py`) ends the server.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from slime_opd import lifetimes
from slime_opd.errors import EngineError, EngineTimeout

_LOG_LINES_IN_ERRORS = 15


# Below what Linux gives to outgoing connections, one of which could take a port before its server does.
_SERVER_PORTS = range(20000, 32768)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that is free at this moment. Raises OSError where none is."""
    for port in random.sample(_SERVER_PORTS, len(_SERVER_PORTS)):
        with socket.socket() as listener:
            try:
                listener.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"found no free port of {host}, expected one from {_SERVER_PORTS.start} to {_SERVER_PORTS.stop - 1}")


class OwnedProcess:
    """One HTTP server and everything it starts.

    `name` is what errors call it; `command` its words; `url` where it will answer;
    `ready_path` the path that answers 200 once it can serve; `log_path` gets its output;
    `environment` is added to this process's own. A context manager starts and stops it.
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
        """Start it; returns at once."""
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
        """Id of the server, and of the process group of everything it started."""
        return self._started().pid

    def exit_code(self) -> int | None:
        """The server's exit code; None while it runs. A signal that killed it is negative."""
        process = self._started()
        if process.returncode is None:
            # Looked at, not collected: until `stop` has ended the group, nobody else may be given its id.
            state = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if state is None:
                return None
            return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
        return process.returncode

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the server can serve.

        Raises EngineError with the end of its log as soon as it exits or has lost a process, EngineTimeout (and
        stops it) after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        pause = 0.05
        with httpx.Client(trust_env=False) as http:
            while True:
                is_ready = self._answers(http, min(5.0, timeout_s))
                if self.exit_code() is None and (lost := self.lost_process()) is not None:
                    self.stop()
                    raise EngineError(
                        f"{self.name} has lost a process while it started ({lost}); the end of {self.log_path}:\n{self.last_log_lines()}"
                    )
                if is_ready:
                    return
                if self.exit_code() is not None:
                    raise EngineError(
                        f"{self.name} exited with code {self.exit_code()} before it was ready; the end of {self.log_path}:\n{self.last_log_lines()}"
                    )
                if time.monotonic() > deadline:
                    self.stop()
                    raise EngineTimeout(
                        f"{self.name} was not ready within {timeout_s:g} s; the end of {self.log_path}:\n{self.last_log_lines()}"
                    )
                time.sleep(pause)
                pause = min(pause * 1.5, 1.0)

    def lost_process(self) -> str | None:
        """A process that the server cannot do without and that has ended by itself; None where there is none that is known of."""
        return None

    def stop(self, grace_s: float = 2.0) -> None:
        """End the server and all it started: SIGTERM, and SIGKILL for what is left after `grace_s` seconds."""
        if self._process is None or self._process.returncode is not None:
            return
        # Python unlinks semaphores when it ends by itself, which those that are killed here do not.
        shared = lifetimes.shared_memory_of(lifetimes.processes_of_group(self.pid))
        self._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        members = lifetimes.processes_of_group(self.pid)
        shared |= lifetimes.shared_memory_of(members)
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        lifetimes.wait_gone(members)
        lifetimes.remove_shared_memory(shared)

    def last_log_lines(self, count: int = _LOG_LINES_IN_ERRORS) -> str:
        """The end of the server's output."""
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

    def _answers(self, http: httpx.Client, timeout_s: float) -> bool:
        try:
            return http.get(f"{self.url}{self._ready_path}", timeout=timeout_s).is_success
        except httpx.TransportError:
            return False

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # nothing of the group is left
            os.killpg(self.pid, number)
