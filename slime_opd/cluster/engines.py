"""The SGLang engines: Ray actors that each own a server process, and the group that starts, watches and stops them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from slime_opd import lifetimes
from slime_opd.cluster.access import Access
from slime_opd.cluster.session import Slot, server_access
from slime_opd.cluster.watchdog import Watchdog
from slime_opd.config import Config
from slime_opd.engine.health import server_workers, worst_status
from slime_opd.engine.ports import free_port
from slime_opd.engine.router import RouterProcess
from slime_opd.engine.server import EngineProcess
from slime_opd.observe.watch import ProcessView, Status

START_TIMEOUT_S = 1800
# Seconds that one poll waits for an engine's actor, and after which an actor that has not answered counts as silent.
POLL_TIMEOUT_S = 0.5
SILENT_AFTER_S = 20.0


@ray.remote
class EngineActor:
    """Owns one SGLang server, which ends with the actor."""

    def __init__(self) -> None:
        lifetimes.own(os.environ[lifetimes.RUN_VARIABLE])

    def start(
        self,
        model: str,
        options: Mapping[str, tuple[str, ...]],
        log: str,
        visible_gpus: list[str] | None,
        access: Access,
    ) -> str:
        """Start the server and wait until it answers; returns its URL."""
        if visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus)
        host = access.host(ray.util.get_node_ip_address())
        self._server = EngineProcess(
            model, host=host, port=free_port(host), options=options, log_path=Path(log), api_key=access.key
        )
        self._server.start()
        self._server.wait_ready(START_TIMEOUT_S)
        self._workers = server_workers(self._server.pid)
        return self._server.url

    def look(self) -> tuple[str, str]:
        """Status of the server's processes, "running", "stopped" or "dead", and the names of those not running."""
        code = self._server.exit_code()
        if code is not None:
            return "dead", f"its server ended with exit code {code}"
        return worst_status(self._workers)


class EngineGroup:
    """All engines of a run. `url`: the address for requests, of the engine or of the router in front of several."""

    def __init__(
        self,
        config: Config,
        slots: list[Slot],
        log_dir: Path,
        watchdog: Watchdog,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment`: environment variables of each engine."""
        self._config, self._log_dir, self._watchdog = config, log_dir, watchdog
        self._names = [f"engine {index}" for index in range(len(slots))]
        self._pending_polls: dict[int, tuple[Any, float]] = {}  # by engine: the call, and when it was made
        self._is_stopping = False
        self._actors = [
            EngineActor.options(**slot.options_in(f"engine-{index}", environment)).remote()
            for index, slot in enumerate(slots)
        ]
        self._router: RouterProcess | None = None
        self.access = server_access()

    def begin_start(self, trainer_gpus: list[list[str]]) -> list[Any]:
        """Start every engine without waiting; with --colocate on the trainers' GPUs. Returns the pending calls."""
        per_engine = self._config.cluster.rollout_num_gpus_per_engine
        pending = []
        for index, actor in enumerate(self._actors):
            shared = trainer_gpus[index * per_engine : (index + 1) * per_engine]
            visible = [gpu for gpus in shared for gpu in gpus] if self._config.cluster.colocate else None
            log = str(self._log_dir / f"engine_{index}.log")
            model = self._config.model.hf_checkpoint
            pending.append(actor.start.remote(model, self._options(), log, visible or None, self.access))
        return pending

    def finish_start(self, pending: list[Any]) -> None:
        """Wait for every engine; start a router if there are several."""
        with self._watchdog.waiting_for("starting the engines"):
            self.urls: list[str] = self._watchdog.get(pending, self._names)
        self.url = self.urls[0]
        if len(self.urls) > 1:
            host = self.access.host(ray.util.get_node_ip_address())
            log = self._log_dir / "router.log"
            self._router = RouterProcess(
                self.urls, host=host, port=free_port(host), log_path=log, api_key=self.access.key
            ).start()
            self._router.wait_ready(START_TIMEOUT_S)
            self.url = self._router.url
        self._watchdog.add(self._look)

    def _look(self) -> list[ProcessView]:
        """The status of the engines and the router, for the watchdog."""
        views = [self._view(index) for index in range(len(self._actors))]
        if self._router is not None:
            code = self._router.exit_code()
            views.append(
                ProcessView("the router", Status.ALIVE)
                if code is None
                else ProcessView("the router", Status.DEAD, f"exit code {code}; its log is {self._router.log_path}")
            )
        # An engine that was stopped during this poll must not be reported as dead.
        return [] if self._is_stopping else views

    def _view(self, index: int) -> ProcessView:
        name, log = self._names[index], self._log_dir / f"engine_{index}.log"
        call, called_at = self._pending_polls.pop(index, (None, 0.0))
        if call is None:
            call, called_at = self._actors[index].look.remote(), time.monotonic()
        try:
            status, names = ray.get(call, timeout=POLL_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            self._pending_polls[index] = call, called_at
            is_silent = time.monotonic() - called_at > SILENT_AFTER_S
            return ProcessView(name, Status.SILENT if is_silent else Status.ALIVE, "its actor" if is_silent else "")
        except ray.exceptions.RayActorError:
            return ProcessView(name, Status.DEAD, f"its actor ended; its log is {log}")
        if status == "dead":
            return ProcessView(name, Status.DEAD, f"{names}, killed by a signal or crashed; its log is {log}")
        return ProcessView(name, Status.STOPPED if status == "stopped" else Status.ALIVE, names)

    def _options(self) -> dict[str, tuple[str, ...]]:
        options = dict(self._config.sglang)
        options.setdefault("tp-size", (str(self._config.cluster.rollout_num_gpus_per_engine),))
        # Requests and responses are token ids; an engine needs a tokenizer only to find stop strings.
        if not self._config.rollout.rollout_stop:
            options.setdefault("skip-tokenizer-init", ())
        options.setdefault("random-seed", (str(self._config.data.rollout_seed),))
        return options

    def stop(self) -> None:
        """End the router and every engine, even if it is still starting; an actor's warden ends its server."""
        self._is_stopping = True
        if self._router is not None:
            self._router.stop()
        for actor in self._actors:
            ray.kill(actor)
