"""The cost of converting a checkpoint tensor by tensor, with verification, against reading and writing it whole.

    python benchmarks/conversion.py [--layers 24] [--directory DIR]

Makes a random Qwen3 in bfloat16 in DIR (1.6B parameters with 24 layers), converts it to torch_dist and back, and
compares every tensor. Prints seconds, the highest memory, and the ratios.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

TOOLS = Path(__file__).parents[1] / "tools"
SHARD = 500_000_000
MODEL = """
import sys, torch, transformers
config = transformers.Qwen3Config(
    vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=int(sys.argv[2]), num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)
torch.manual_seed(0)
model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(sys.argv[1], max_shard_size=int(sys.argv[3]))
"""
# The lower bound for a converter that holds the whole model: each byte is read and written once, nothing is checked.
ALL_AT_ONCE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
state = {}
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    state |= {name: weight.clone() for name, weight in load_file(file).items()}
torch.save(state, sys.argv[2])
"""


def measured(*arguments: object) -> tuple[float, float]:
    """Run Python with `arguments`; returns seconds and peak resident memory in GiB."""
    started, highest = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-W", "ignore", *map(str, arguments)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        except OSError:
            lines = []
        highest = max([highest, *(int(line.split()[1]) for line in lines)])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"'{arguments[0]}' failed; its output is above")
    return time.perf_counter() - started, highest / 2**20


def weights_of(directory: Path) -> Iterator[tuple[str, int]]:
    """Name and checksum of each weight."""
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                yield name, zlib.crc32(weights.get_tensor(name).view(torch.uint8).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    workdir = Path(tempfile.mkdtemp(dir=options.directory))
    source, torch_dist, back = workdir / "source", workdir / "torch_dist", workdir / "back"
    try:
        measured("-c", MODEL, source, options.layers, SHARD)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2**30
        to_torch_dist = measured(TOOLS / "convert_hf_to_torch_dist.py", "--hf-checkpoint", source, "--save", torch_dist)
        flags = ["--input-dir", torch_dist, "--output-dir", back, "--origin-hf-dir", source, "--chunk-size", SHARD]
        to_hugging_face = measured(TOOLS / "convert_torch_dist_to_hf.py", *flags)
        plain = measured("-c", ALL_AT_ONCE, source, workdir / "all.pt")
        before, after = (dict(weights_of(directory)) for directory in (source, back))
        same = sum(before[name] == after.get(name) for name in before)
        print(f"{size:.1f} GiB of weights; {same} of {len(before)} tensors are bit-identical after both conversions")
        print("| | seconds | GiB | time | memory |\n| --- | --- | --- | --- | --- |")
        for name, (seconds, memory) in (
            ("all at once, unchecked", plain),
            ("to torch_dist", to_torch_dist),
            ("to Hugging Face", to_hugging_face),
        ):
            print(f"| {name} | {seconds:.1f} | {memory:.2f} | {seconds / plain[0]:.2f} | {memory / plain[1]:.2f} |")
    finally:
        shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
