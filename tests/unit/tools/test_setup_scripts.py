"""The two installers refuse in one sentence, install what setup.py lists in the right order, and check it."""

import os
import re
import runpy
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
CPU = ROOT / "tools/setup_cpu.sh"
GPU = ROOT / "tools/setup_gpu.sh"

# Stands for every interpreter: writes down what it is asked to run, and refuses what matches REFUSE (a regular
# expression).
PYTHON = """#!/bin/bash
[ "$1" = --version ] && { echo "Python ${VERSION:-3.12.4}"; exit; }
echo "CUDA_HOME=${CUDA_HOME:-} CPATH=${CPATH:-} $*" >>"$LOG"
[[ -n ${REFUSE:-} && "$*" =~ $REFUSE ]] && exit 1
if [ "$1 $2" = "-m venv" ]; then
   mkdir -p "$3/bin" "$3/lib/python3.12/site-packages/nvidia/cudnn/include"
   cp "$0" "$3/bin/python"
fi
exit 0
"""
NVCC = '#!/bin/bash\necho "Cuda compilation tools, release ${RELEASE:-12.8}, V12.8.93"\n'
NO_DRIVER = r"libcuda\.so"


@pytest.fixture
def machine(tmp_path):
    """A directory of commands that describes a machine on which nothing is missing."""
    commands = tmp_path / "bin"
    for path, text in {
        commands / "python3": PYTHON,
        commands / "uname": '#!/bin/bash\n[ "$1" = -s ] && echo Linux || echo x86_64\n',
        commands / "g++": "#!/bin/bash\n",
        commands / "df": '#!/bin/bash\necho "Filesystem blocks used free"\necho "disk 9 9 ${FREE_KB:-99000000}"\n',
        tmp_path / "cuda/bin/nvcc": NVCC,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def setup(machine: Path, script: Path = GPU, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ("WITHOUT_NVCC", "WITH_FLASH_ATTN", "MAX_JOBS", "CXX", "PYTHON", "CUDA_PATH")
    inherited = {name: value for name, value in os.environ.items() if name not in options}
    described = {
        "PATH": f"{machine / 'bin'}:/usr/bin:/bin",
        "LOG": str(machine / "log"),
        "CUDA_HOME": str(machine / "cuda"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        ["bash", str(script), str(machine / "venv")],
        env={**inherited, **described, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def commands_run(machine: Path) -> list[str]:
    return (machine / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"PYTHON": "no-such-python"}, "found no no-such-python, expected Python 3.11 or 3.12; set PYTHON"),
        (
            {"REFUSE": "version_info", "VERSION": "3.13.0"},
            "found Python 3.13.0 at .*, expected 3.11 or 3.12; set PYTHON",
        ),
        ({"REFUSE": "Python.h"}, r"found no Python.h for python3, expected Python's headers; install them"),
        ({"REFUSE": "libnuma"}, r"found no libnuma.so.1, expected it: SGLang's kernels are linked to it; install it"),
        ({"CXX": "no-such-compiler"}, r"found no C\+\+ compiler no-such-compiler, expected g\+\+ 9 or newer; install"),
        (
            {"CUDA_HOME": "/nowhere"},
            r"found no nvcc in CUDA_HOME, .* expected a CUDA toolkit \(12.8\): .* WITHOUT_NVCC=1",
        ),
        (
            {"RELEASE": "13.0"},
            r"found CUDA 13.0 at .*/cuda/bin/nvcc, expected 12.x .* CUDA_HOME=…, or set WITHOUT_NVCC=1",
        ),
        ({"WITHOUT_NVCC": "1", "WITH_FLASH_ATTN": "1"}, "found WITHOUT_NVCC and WITH_FLASH_ATTN, expected one of them"),
        ({"MAX_JOBS": "all"}, "found MAX_JOBS=all, expected a number of compilers, 1 or more"),
        ({"FREE_KB": "1048576"}, "found 1 GB free for .*/venv, expected at least 20"),
    ],
)
def test_the_gpu_installer_refuses_a_machine_that_lacks_something_in_one_sentence(machine, environment, sentence):
    run = setup(machine, **environment)
    assert run.returncode == 1
    assert re.match(f"setup_gpu: error: {sentence}", run.stderr), run.stderr
    assert run.stderr.count("\n") == 1
    assert not (machine / "log").exists() or not any("pip install" in line for line in commands_run(machine))


@pytest.mark.parametrize(("system", "hardware"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_the_gpu_installer_refuses_a_system_whose_torch_wheel_has_no_cuda(machine, system, hardware):
    (machine / "bin/uname").write_text(f'#!/bin/bash\n[ "$1" = -s ] && echo {system} || echo {hardware}\n')
    run = setup(machine)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"setup_gpu: error: found {system} {hardware}, expected Linux x86_64")


def test_the_cpu_installer_refuses_an_interpreter_that_is_missing_or_old(machine):
    missing = setup(machine, CPU, PYTHON="no-such-python")
    assert missing.returncode == 1
    assert missing.stderr.startswith("setup_cpu: error: found no no-such-python, expected Python 3.11 or newer")
    old = setup(machine, CPU, REFUSE="version_info", VERSION="3.10.1")
    assert old.returncode == 1
    assert old.stderr.startswith("setup_cpu: error: found Python 3.10.1 at")


def test_the_cpu_installer_refuses_a_machine_with_a_gpu(machine):
    (machine / "bin/nvidia-smi").write_text("#!/bin/bash\n")
    (machine / "bin/nvidia-smi").chmod(0o755)
    run = setup(machine, CPU, CUDA_VISIBLE_DEVICES="0")
    assert run.returncode == 1
    assert "use tools/setup_gpu.sh" in run.stderr


def test_transformer_engine_is_compiled_for_the_torch_that_is_there_with_the_headers_of_its_libraries(machine):
    assert setup(machine, REFUSE=NO_DRIVER).returncode == 0
    installs = [line for line in commands_run(machine) if " install " in line]
    sglang, builder, engine = installs
    assert sglang.endswith(f"install -e {ROOT}[gpu,test]")
    assert "nvidia-cuda-cccl-cu12==12.8.*" in builder
    assert engine.endswith(f"install --no-build-isolation -e {ROOT}[transformer-engine]")
    assert "venv/bin/no-toolkit " in engine
    assert "site-packages/nvidia/cudnn/include:" in engine


def test_flash_attention_is_compiled_on_request_with_the_toolkit(machine):
    assert setup(machine, WITH_FLASH_ATTN="1").returncode == 0
    lines = commands_run(machine)
    flash = next(line for line in lines if line.endswith(f"--no-build-isolation -e {ROOT}[flash-attn]"))
    assert flash.startswith(f"CUDA_HOME={machine / 'cuda'} ")
    assert any("import sgl_kernel" in line and "flash_attn" in line for line in lines)


def test_a_torch_for_another_cuda_is_not_built_upon(machine):
    run = setup(machine, REFUSE="torch.version.cuda != ")
    assert run.returncode == 1
    assert "expected a build for CUDA 12.8; use a package index with PyPI's wheels" in run.stderr
    assert not any("transformer-engine" in line for line in commands_run(machine))


def test_imports_that_need_a_driver_are_checked_only_with_a_driver(machine):
    without = setup(machine, REFUSE=NO_DRIVER)
    assert "not checked, as this machine has no NVIDIA driver: import of sgl_kernel sglang" in without.stdout
    assert not any("import sgl_kernel" in line for line in commands_run(machine))
    again = setup(machine, REFUSE=NO_DRIVER)
    assert (again.returncode, again.stdout) == (0, f"setup_gpu: {machine / 'venv'} is up to date\n")

    broken = setup(machine, REFUSE="^-W ignore -c import sgl_kernel")
    assert broken.returncode == 1
    assert "setup_gpu: error: " in broken.stderr
    with_driver = setup(machine)
    assert with_driver.returncode == 0
    assert any("import sgl_kernel, sglang" in line for line in commands_run(machine))
    for refuse in ("", NO_DRIVER):  # on the GPU machine, and back on the one without
        assert "is up to date" in setup(machine, REFUSE=refuse).stdout


def package() -> dict:
    """What setup.py passes to setuptools."""
    arguments: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def ranges(requirements: list[str]) -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, requirements)}


def constant(script: Path, name: str) -> str:
    return re.search(rf"^{name}=(\S+)", script.read_text(), re.M)[1]


def test_the_installers_take_their_versions_from_setup_py():
    extras = package()["extras_require"]
    for script in (CPU, GPU):
        named = re.findall(r"\$\{ROOT\}\[([\w,-]+)\]", script.read_text())
        assert set(",".join(named).split(",")) <= set(extras)
    assert constant(CPU, "TORCH") == str(ranges(extras["cpu"])["torch"])
    assert constant(CPU, "SGLANG") == str(ranges(extras["gpu"])["sglang"])
    assert "transformer-engine" not in ranges(extras["gpu"])  # pip's isolated build would take another torch


def test_the_image_has_the_toolkit_and_the_interpreter_that_the_installer_expects():
    image = (ROOT / "Dockerfile").read_text()
    assert re.search(rf"^FROM nvidia/cuda:{re.escape(constant(GPU, 'CUDA'))}\.\d+-devel-", image, re.M)
    assert re.search(r"^RUN .*PYTHON=python3\.12 .*tools/setup_gpu\.sh", image, re.M)
    assert "python3.12-dev python3.12-venv" in image
    assert "pip install" not in image


@pytest.mark.parametrize("library", ["sglang", "megatron-core"])
def test_what_the_libraries_pin_is_within_setup_pys_ranges(library):
    everything = package()
    ours = ranges([*everything["install_requires"], *everything["extras_require"]["transformer-engine"]])
    shared = [
        theirs
        for theirs in map(Requirement, requires(library))
        if theirs.name in ours and (theirs.marker is None or theirs.marker.evaluate({"extra": "dev"}))
    ]
    assert {theirs.name for theirs in shared} >= {"torch"}
    for theirs in shared:
        for specifier in theirs.specifier:
            if specifier.operator == "==":
                assert ours[theirs.name].specifier.contains(specifier.version), theirs
    if library == "megatron-core":
        engine = next(theirs for theirs in shared if theirs.name == "transformer-engine").specifier
        allowed = list(ours["transformer-engine"].specifier.filter(["2.8.0", "2.9.0", "2.10.0", "2.11.0", "2.19.0"]))
        assert allowed == ["2.9.0", "2.10.0"]
        assert list(engine.filter(allowed)) == allowed


def test_the_license_is_the_one_that_setup_py_names():
    assert package()["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability." in text
