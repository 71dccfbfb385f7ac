"""Silence irrelevant warnings of libraries, each by its own text or logger, so that new warnings are still shown."""

from __future__ import annotations

import logging
import warnings


def silence_megatron() -> None:
    """Silence warnings of Megatron-core and mbridge about packages that are not installed and an unused feature.

    Call it before either is imported.
    """
    # Megatron's own layers replace Apex, on a CPU and on a GPU without Apex.
    for message in ("Apex is not installed", "Transformer Engine and Apex are not installed"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    # torch's extension compiler, which Megatron imports, reports a CUDA toolkit without a GPU, as on a login node.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # It logs two warnings on the first step, although it is disabled.
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
