"""The conversion tools as a user runs them: several processes, a model larger than memory should hold, and inputs that are wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.dist

TOOLS = Path(__file__).parents[2] / "tools"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_two_processes_share_the_work_and_make_the_same_checkpoint(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "out" / "release.partial").mkdir(parents=True)  # what a killed conversion leaves
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29417]
    made = run(*launcher, TOOLS / "convert_hf_to_torch_dist.py", "--hf-checkpoint", tiny_model_dir, "--save", tmp_path / "out")
    assert made.returncode == 0, made.stderr[-2000:]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    kept = tmp_path / "out" / "release" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == (tiny_model_dir / "tokenizer.json").read_bytes()
    again = run(TOOLS / "convert_hf_to_torch_dist.py", "--hf-checkpoint", tiny_model_dir, "--save", tmp_path / "out")
    assert again.returncode == 2 and "is not empty; choose another directory or add --force" in again.stderr
    words = ["--input-dir", tmp_path / "out", "--output-dir", tmp_path / "back", "--origin-hf-dir", tiny_model_dir]
    back = run(TOOLS / "convert_torch_dist_to_hf.py", *words)
    assert back.returncode == 0, back.stderr[-2000:]
    before, after = (load_file(d / "model.safetensors") for d in (tiny_model_dir, tmp_path / "back"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    for directory in (tmp_path / "out" / "release", tmp_path / "back"):
        subprocess.run(["sha256sum", "--check", "--quiet", "manifest.sha256"], cwd=directory, check=True)


# 24 layers of 16 MiB, in files of 16 MiB.
LAYERS, MIB = 24, 2**20


def peak_memory(rank, world_size, init_method, directory: str):
    """Bytes that each conversion adds to the highest memory of this process, and the size of the model."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from slime_opd.config import stages
    from slime_opd.config.config import Config
    from slime_opd.checkpoint.formats import hf_to_torch_dist, hf_writer, torch_dist, torch_dist_to_hf
    from slime_opd.model import parallel

    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = Qwen3Config(vocab_size=64, num_hidden_layers=LAYERS, head_dim=64, tie_word_embeddings=False, **shape)
    source, made = Path(directory) / "source", Path(directory) / "made"
    child = os.fork()
    if child == 0:
        # In a process of its own: memory that was once had is not given back.
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).float().save_pretrained(source, max_shard_size="16MB")
        os._exit(0)
    os.waitpid(child, 0)
    made.mkdir()
    torch_dist._FILE_BYTES = 16 * MIB
    parallel.initialize(
        stages.ParallelConfig(), rank=rank, world_size=world_size, init_method=init_method, seed=0, timeout_minutes=5
    )
    config = Config(
        model=stages.ModelConfig(hf_checkpoint=str(source), megatron_to_hf_mode="bridge"),
        training=stages.TrainingConfig(fp32=True),
    )
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    with torch.no_grad():
        hf_to_torch_dist.convert(config, made)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    groups, _ = torch_dist_to_hf.trained_weights(torch_dist.Reader(made), str(source))
    options = {"shard_bytes": 16 * MIB, "overwrite": False, "source": ""}
    hf_writer.write(groups, Path(directory) / "back", source, **options)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    parallel.shut_down()
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return [(after - peaks[0]) * 1024 for after in peaks[1:]], size


def test_memory_is_that_of_a_file_and_not_of_the_model(tmp_path):
    (rendezvous := tmp_path / "rendezvous").mkdir()
    ((to_torch_dist, to_hugging_face), size) = run_ranks(peak_memory, 1, rendezvous, str(tmp_path))[0]
    assert size > 300 * MIB
    # Two files and a tensor or two; what else there is, is what libraries keep for themselves.
    assert max(to_torch_dist, to_hugging_face) < 100 * MIB, (to_torch_dist / MIB, to_hugging_face / MIB)


def refusals(rank, world_size, init_method, model_dir: str, directory: str):
    """What is said of a Hugging Face directory that lacks a weight, has one too many, and has one of another shape."""
    import torch
    from safetensors.torch import load_file, save_file

    from slime_opd.config import stages
    from slime_opd.config.config import Config
    from slime_opd.errors import CheckpointError
    from slime_opd.checkpoint.formats import hf_to_torch_dist
    from slime_opd.model import parallel
    from slime_opd.checkpoint.formats.load_hugging_face import load_hugging_face
    from slime_opd.model.bridge import make_bridge
    from slime_opd.model.builder import build_model

    parallel.initialize(
        stages.ParallelConfig(), rank=rank, world_size=world_size, init_method=init_method, seed=0, timeout_minutes=5
    )
    weights, norm = load_file(f"{model_dir}/model.safetensors"), "model.layers.1.post_attention_layernorm.weight"
    said = []
    for number, wrong in enumerate((
        {name: w for name, w in weights.items() if name != norm},
        weights | {"model.layers.1.self_attn.sinks": torch.ones(2)},
        weights | {norm: torch.ones(9)},
    )):  # fmt: skip
        place = Path(directory) / str(number)
        (place / "made").mkdir(parents=True)
        (place / "config.json").write_text((Path(model_dir) / "config.json").read_text())
        save_file(wrong, place / "model.safetensors")
        config = Config(
            model=stages.ModelConfig(hf_checkpoint=str(place), megatron_to_hf_mode="bridge"),
            training=stages.TrainingConfig(fp32=True),
        )
        with pytest.raises(CheckpointError) as refusal, torch.no_grad():
            hf_to_torch_dist.convert(config, place / "made")
        said.append(str(refusal.value).replace(str(place), "DIR"))
        if number == 0:
            bridge = make_bridge(config)
            with pytest.raises(CheckpointError, match=re.escape(str(refusal.value))):
                load_hugging_face(build_model(config, bridge), bridge, str(place), "--hf-checkpoint")
    parallel.shut_down()
    return said


def test_weights_that_do_not_fit_the_config_are_refused(tiny_model_dir, tmp_path):
    (rendezvous := tmp_path / "rendezvous").mkdir()
    lacks, has, shape = run_ranks(refusals, 1, rendezvous, str(tiny_model_dir), str(tmp_path))[0]
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert lacks == f"--hf-checkpoint DIR lacks 1 of the weights that its config.json describes, first {norm}"
    assert has.startswith("--hf-checkpoint DIR has 1 weights that its config.json does not describe, first model.layers.1.self_attn.sinks")
    assert shape.startswith(f"--hf-checkpoint DIR: {norm} make [9], expected [64] for decoder.layers.1.pre_mlp_layernorm.weight")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--input-dir", "MODEL", "--origin-hf-dir", "MODEL"], "is a Hugging Face directory already"),
        (["--input-dir", "EMPTY", "--origin-hf-dir", "MODEL"], "no checkpoint there; expected a latest_checkpointed_iteration.txt"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused_with_a_sentence(tiny_model_dir, tmp_path, words, expected):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(tiny_model_dir), "EMPTY": str(tmp_path / "empty")}
    refused = run(TOOLS / "convert_torch_dist_to_hf.py", *[places.get(w, w) for w in words], "--output-dir", tmp_path / "o")
    assert refused.returncode == 2 and expected in refused.stderr and "Traceback" not in refused.stderr
    assert json.dumps(refused.stdout) == '""'


def test_a_damaged_hugging_face_directory_is_not_converted(tiny_model_dir, tmp_path):
    from slime_opd.checkpoint import manifest

    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    manifest.write(model, manifest.measure(model, manifest.listed_files(model)))
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (model / "model.safetensors").write_bytes(content)
    refused = run(TOOLS / "convert_hf_to_torch_dist.py", "--hf-checkpoint", model, "--save", tmp_path / "out")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"--hf-checkpoint {model}: model.safetensors is damaged: its contents differ from" in refused.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run.lock"]
