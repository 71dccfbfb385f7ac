"""Packaging of slime_opd. Ranges hold the versions that were run; `tools/setup_cpu.sh` uses the cpu extra."""

from setuptools import find_packages, setup

# What the package imports on every machine.
EVERYWHERE = [
    "torch>=2.9.1,<2.14",
    "megatron-core>=0.16.1,<0.17",
    "mbridge>=0.15.1,<0.16",
    "transformers>=4.57.1,<6",
    "safetensors>=0.8,<0.9",
    "ray[default]>=2.60,<2.61",
    "sglang-router>=0.3.2,<0.4",
    "argcomplete>=3.7,<3.8",
    "httpx>=0.28.1,<0.29",
    "jinja2>=3.1.6,<3.2",  # chat templates; transformers does not declare it
    "math-verify>=0.9,<0.10",
    "matplotlib>=3.11,<3.12",
    "numpy>=2.4,<2.5",
    "psutil>=7.2,<7.3",  # megatron-core's checkpoint writer does not declare it
    "pyarrow>=26,<27",
    "pyyaml>=6.0.3,<6.1",
    "rich>=15,<16",
    "tensorboard>=2.21,<2.22",
]

# What SGLang 0.5.9 imports to serve a text model on a CPU. SGLang itself is not here: its own
# requirements bring CUDA packages that neither fit nor start on a CPU, and an extra cannot say --no-deps.
CPU = [
    "torch==2.13.0",
    "transformers==4.57.1",
    "aiohttp>=3.14,<3.15",
    "compressed-tensors>=0.20,<0.21",
    "dill>=0.4.1,<0.5",
    "einops>=0.8.2,<0.9",
    "fastapi>=0.165,<0.166",
    "gguf>=0.19,<0.20",
    "ipython>=9.18,<10",
    "jsonschema>=4.26,<5",
    "msgspec>=0.22,<0.23",
    "openai>=3.52,<4",
    "openai-harmony==0.0.8",
    "orjson>=3.13,<4",
    "partial-json-parser==0.2.1.1.post7",
    "pillow>=13,<14",
    "pybase64>=1.5.1,<2",
    "pydantic>=2.14,<3",
    "pyzmq>=27.3,<28",
    "sentencepiece>=0.2.3,<0.3",
    "setproctitle>=1.3.8,<2",
    "starlette>=1.10,<2",
    "triton>=3.9,<4",
    "uvicorn>=0.54,<0.55",
    "uvloop>=0.23,<0.24",
]

# What tools/setup_gpu.sh installs, in this order; docs/gpu_install.md says how far it was tried.
# SGLang pins torch 2.9.1, transformers 4.57.1 and its kernels; it has wheels for Python 3.11 and 3.12.
# It also requires datasets without a range; a resolver may choose 2.14, which cannot be imported beside pyarrow 26.
GPU = ["sglang==0.5.9", "datasets>=5.0.1,<6"]
# Within megatron-core 0.16.1's range, <2.12; 2.11 looks for CUDA 12's libcudart.so in a directory that its wheel does
# not have. Not in the gpu extra: it must be compiled for the torch that is installed, so without pip's build isolation.
TRANSFORMER_ENGINE = ["transformer-engine[pytorch]>=2.9,<2.11"]
# The newest that Transformer Engine 2.10 accepts: it takes 2.8.3.post1 for too new.
FLASH_ATTN = ["flash-attn==2.8.3"]

WANDB = ["wandb>=0.31,<0.32"]

TEST = [
    "pytest>=9.2,<10",
    "pytest-xdist>=3.8,<4",
    "hypothesis>=6.170,<7",
    "mypy>=2.4.1,<2.5",
    "ruff>=0.17.5,<0.18",
    *WANDB,
]

setup(
    name="slime_opd",
    version="0.1.0",
    description="On-policy distillation of language models: Megatron-core trains, SGLang generates, Ray places",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["slime_opd", "slime_opd.*"]),
    package_data={"slime_opd.rehearsal": ["simulated_cuda.cpp"]},
    install_requires=EVERYWHERE,
    entry_points={"console_scripts": ["slime_opd = slime_opd.__main__:entry"]},
    extras_require={
        "cpu": CPU,
        "gpu": GPU,
        "transformer-engine": TRANSFORMER_ENGINE,
        "flash-attn": FLASH_ATTN,
        "wandb": WANDB,
        "test": TEST,
    },
)
