"""A server's API key: it reaches the server and the requests to it, and nobody who looks at processes or logs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import httpx

from slime_opd.engine.client import EngineClient
from slime_opd.engine.control import EngineControl
from slime_opd.engine.router import RouterProcess
from slime_opd.engine.server import EngineProcess
from slime_opd.engine.with_key import KEY_VARIABLE, Key, command_with_key, key_environment

SECRET = "correct-horse-battery"

# As SGLang: it parses its arguments, logs them, and sends them to a process that it spawns, with its main module.
SERVER = """
import argparse, multiprocessing, os, sys
def child(arguments):
    print("child has the key:", arguments.api_key == "correct-horse-battery", flush=True)
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key", type=str)
    arguments = parser.parse_args()
    print(arguments, f"{arguments=}", sys.argv[1:], flush=True)
    print("server has the key:", arguments.api_key == "correct-horse-battery", arguments.port, flush=True)
    print("left in the environment:", os.environ.get("SLIME_OPD_SERVER_KEY"), flush=True)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(arguments,))
    process.start()
    process.join()
    print(open("/proc/self/cmdline").read().replace(chr(0), " "), flush=True)
"""


def test_a_server_gets_the_key_without_showing_it(tmp_path):
    (tmp_path / "scripted_server.py").write_text(SERVER)
    command = command_with_key([sys.executable, "-m", "scripted_server", "--port", "5"])
    search_path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    environment = {**os.environ, **key_environment(SECRET), "PYTHONPATH": search_path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    for line in ("server has the key: True 5", "child has the key: True", "left in the environment: None"):
        assert line in run.stdout
    assert "scripted_server --port 5" in run.stdout
    assert SECRET not in run.stdout + run.stderr and "****" in run.stdout


def test_the_repr_of_a_key_hides_its_value():
    key = Key(SECRET)
    assert key == SECRET and f"Bearer {'' + key}" == f"Bearer {SECRET}"
    assert repr(key) == "'****'" and SECRET not in f"{[key]} { ({'api_key': key}) }"


def test_servers_and_router_take_the_key_from_their_environment(tmp_path):
    engine = EngineProcess("/m", port=1, log_path=tmp_path / "log", api_key=SECRET)
    router = RouterProcess(["http://a:1"], port=2, log_path=tmp_path / "log", api_key=SECRET)
    for process in (engine, router):
        assert process.command[2] == "slime_opd.engine.with_key"
        assert SECRET not in " ".join(process.command)
        assert process._environment[KEY_VARIABLE] == SECRET
    assert KEY_VARIABLE not in EngineProcess("/m", port=1, log_path=tmp_path / "log")._environment


def test_requests_carry_the_key():
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("Authorization"))
        return httpx.Response(200, json={})

    transport = httpx.MockTransport(answer)

    async def ask(key: str | None) -> None:
        client = EngineClient("http://h", concurrency=1, timeout_s=5, retries=0, api_key=key, transport=transport)
        await client.health()
        await client.aclose()

    for key in (SECRET, None):
        with EngineControl("http://h", api_key=key, transport=transport) as control:
            control.set_weight_version("2")
        asyncio.run(ask(key))
    assert sent == [f"Bearer {SECRET}"] * 2 + [None] * 2
