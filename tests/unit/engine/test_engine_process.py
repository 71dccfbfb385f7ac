"""Commands and options of servers; the lifecycle itself is tested on real servers in tests/e2e."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime_opd.engine import cpu_launcher, router, weight_proof
from slime_opd.engine.ports import free_port
from slime_opd.engine.process import OwnedProcess
from slime_opd.engine.router import RouterProcess
from slime_opd.engine.server import EngineProcess, engine_command
from slime_opd.errors import EngineError
from slime_opd.lifetimes.processes import is_alive, processes_in_group


def test_the_engine_command_depends_on_cuda():
    options = {"mem-fraction-static": ("0.7",), "disable_radix_cache": ()}
    command = engine_command("/m", host="h", port=5, options=options, has_cuda=True)
    assert command[1:] == [
        "-m", "sglang.launch_server", "--model-path", "/m", "--host", "h", "--port", "5",
        "--custom-weight-loader", weight_proof.LOADER, "--mem-fraction-static", "0.7", "--disable-radix-cache",
    ]  # fmt: skip
    on_cpu = engine_command("/m", host="h", port=5, options={}, has_cuda=False)
    assert on_cpu[2] == "slime_opd.engine.cpu_launcher"


def test_the_weight_loader_is_an_importable_name():
    module, name = weight_proof.LOADER.rsplit(".", 1)
    assert getattr(sys.modules[module], name) is weight_proof.begin


def test_cpu_options_are_defaults_that_a_user_overrides():
    completed = cpu_launcher.with_default_options(["--dtype=bfloat16", "--max-total-tokens", "99", "--port", "1"])
    assert completed[:5] == ["--dtype=bfloat16", "--max-total-tokens", "99", "--port", "1"]
    assert completed.count("--dtype") == 0
    assert completed.count("--max-total-tokens") == 1
    assert completed[completed.index("--device") + 1] == "cpu"
    assert "--sleep-on-idle" in completed


def test_stubs_can_be_imported_and_raise_when_called():
    stubs = cpu_launcher._StubFinder(("absent_kernels",))
    sys.meta_path.insert(0, stubs)
    try:
        from absent_kernels import silu_and_mul
        from absent_kernels.deep.down import Mode

        with pytest.raises(NotImplementedError, match=r"absent_kernels\.silu_and_mul does not run on a CPU"):
            silu_and_mul(1)
        assert isinstance(Mode.BICUBIC, cpu_launcher._Stub)
        assert importlib.util.find_spec("another_absent_package") is None
    finally:
        sys.meta_path.remove(stubs)
    assert cpu_launcher._StubFinder(("sgl_kernel",)).find_spec("sgl_kernel.scalar_type") is None


def test_importing_the_launcher_prepares_nothing():
    before = list(sys.meta_path)
    importlib.reload(cpu_launcher)
    assert sys.meta_path == before


def test_a_routers_metrics_have_a_free_port_of_its_own_address(tmp_path, monkeypatch):
    monkeypatch.setattr(router, "free_port", lambda host: {"127.0.0.2": 4711}[host])
    command = RouterProcess(["http://a:1"], host="127.0.0.2", port=9, log_path=tmp_path / "log").command
    assert command[command.index("--prometheus-host") + 1] == "127.0.0.2"
    assert command[command.index("--prometheus-port") + 1] == "4711"


def test_a_router_knows_its_workers(tmp_path):
    process = RouterProcess(["http://a:1", "http://b:2"], port=9, log_path=tmp_path / "log")
    assert process.command[2:6] == ("sglang_router.launch_router", "--worker-urls", "http://a:1", "http://b:2")
    assert process.url == "http://127.0.0.1:9"


def owned(tmp_path: Path, source: str, port: int = 1) -> OwnedProcess:
    return OwnedProcess(
        name="the test server",
        command=[sys.executable, "-S", "-c", source],
        url=f"http://127.0.0.1:{port}",
        ready_path="/",
        log_path=tmp_path / "logs" / "server.log",
    )


def test_an_engine_that_loses_its_detokenizer_while_it_starts_is_an_error(tmp_path):
    # SGLang's HTTP process goes on without it, and answers as long as nobody asks for text.
    child = ["bash", "-c", "exec -a sglang::detokenizer sleep 3"]
    source = f"import subprocess, time; subprocess.Popen({child}); time.sleep(600)"
    engine = EngineProcess("/m", port=free_port(), log_path=tmp_path / "log")
    engine.command = (sys.executable, "-S", "-c", source)
    with engine, pytest.raises(EngineError, match=r"has lost a process while it started \(detokenizer, process \d+\)"):
        engine.wait_ready(60)


def test_a_process_that_ends_before_it_is_ready_is_reported_with_its_code_and_log(tmp_path):
    with owned(tmp_path, "print('no such model'); raise SystemExit(3)") as process:
        with pytest.raises(EngineError, match=r"the test server exited with code 3 (.|\n)*no such model"):
            process.wait_ready(30)
        assert process.exit_code() == 3


def test_stopping_ends_the_whole_group_even_what_ignores_sigterm(tmp_path):
    source = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    process = owned(tmp_path, source).start()
    while not (started := process.last_log_lines()).isdigit():
        assert process.exit_code() is None, started
    assert Path(f"/proc/{started}").exists()
    process.stop(grace_s=0.2)
    assert wait_until(lambda: not is_alive(int(started)))
    assert process.exit_code() is not None
    process.stop()  # a second stop is nothing


def wait_until(condition, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds


OWNER = """
import sys, threading, time
from pathlib import Path
from slime_opd.engine.process import OwnedProcess
source = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']); time.sleep(600)"
process = OwnedProcess(
    name="the test server", command=[sys.executable, "-S", "-c", source], url="http://127.0.0.1:1", ready_path="/",
    log_path=Path(sys.argv[1]),
)
thread = threading.Thread(target=process.start)
thread.start()
thread.join()
print(process.pid, flush=True)
time.sleep(600)
"""


def test_a_server_outlives_the_thread_that_started_it_and_not_its_killed_owner(tmp_path):
    command = [sys.executable, "-c", OWNER, str(tmp_path / "log")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        group = int(owner.stdout.readline())  # printed when the thread has ended
        assert wait_until(lambda: len(processes_in_group(group)) == 2), processes_in_group(group)
        assert os.getsid(group) == group, "Ctrl-C in the owner's terminal must not reach the server"
        owner.kill()
        owner.wait()
        assert wait_until(lambda: not processes_in_group(group)), processes_in_group(group)
    finally:
        owner.kill()
        owner.communicate()


def test_a_process_is_started_once_and_has_no_exit_code_before(tmp_path):
    process = owned(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(EngineError, match="was not started"):
        process.exit_code()
    with process, pytest.raises(EngineError, match="was started already"):
        process.start()


def test_a_free_port_can_be_bound():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_a_free_port_of_all_addresses_is_printed_for_scripts():
    command = [sys.executable, "-m", "slime_opd.engine.ports"]
    port = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with socket.socket() as listener:
        listener.bind(("", port))
