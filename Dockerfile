# The GPU environment of tools/setup_gpu.sh in an image: docker build -t slime_opd .
#
# A devel image, as SGLang compiles kernels with nvcc when an engine starts; without cuDNN, as
# Transformer Engine would load the image's before the one that torch was built for.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    curl g++ git libnuma1 python3.12-dev python3.12-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/slime_opd
COPY . .
RUN PIP_NO_CACHE_DIR=1 PYTHON=python3.12 bash tools/setup_gpu.sh /opt/venv
ENV PATH=/opt/venv/bin:$PATH
