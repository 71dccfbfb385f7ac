"""The model scripts in scripts/models, their arguments, and the sizes of the published models."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = sorted((ROOT / "scripts/models").glob("*.sh"))

# Weights in the checkpoints that were published, a tied output layer counted once.
PARAMETERS = {
    "qwen3-0.6B": 596_049_920,
    "qwen3-1.7B": 1_720_574_976,
    "qwen3-4B": 4_022_468_096,
    "qwen3-8B": 8_190_735_360,
    "qwen3-14B": 14_768_307_200,
    "qwen3-32B": 32_762_123_264,
    "qwen2.5-0.5B": 494_032_768,
    "qwen2.5-1.5B": 1_543_714_304,
    "qwen2.5-3B": 3_085_938_688,
    "qwen2.5-7B": 7_615_616_512,
    "qwen2.5-14B": 14_770_033_664,
    "qwen2.5-32B": 32_763_876_352,
    "qwen2.5-72B": 72_706_203_648,
    "llama3.1-8B": 8_030_261_248,
    "llama3.1-70B": 70_553_706_496,
    "llama3.2-1B": 1_235_814_400,
    "llama3.2-3B": 3_212_749_824,
    "llama3.1-405B": 405_853_388_800,
    "qwen3-30B-A3B": 30_532_122_624,
    "qwen3-235B-A22B": 235_093_634_560,
    "mixtral-8x7B": 46_702_792_704,
    "mixtral-8x22B": 140_620_634_112,
    "glm4-9B": 9_400_279_040,
    "glm4-32B": 32_566_081_536,
    # Without the layer for multi-token prediction, and without the router's biases, which transformers does not count.
    "glm4.5-355B-A32B": 352_797_814_784,
    "glm4.5-106B-A12B": 106_852_245_504,
    "mimo-7B": 7_622_619_136,
    "deepseek-v3": 671_026_404_352,
    "moonlight-16B-A3B": 15_960_108_544,
}


def bash(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def model_arguments(script: Path) -> list[str]:
    """The arguments that a model script sets."""
    run = bash(f"source '{script}'; printf '%s\\n' \"${{MODEL_ARGS[@]}}\"")
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.splitlines()
