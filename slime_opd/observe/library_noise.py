"""Lines of other libraries that tell a user nothing: each is silenced by its own text or logger, so that a new one is seen."""

from __future__ import annotations

import logging
import warnings


def silence_megatron() -> None:
    """Megatron-core's and mbridge's lines about what is not installed, printed at import, and about a feature that is not used here.

    Call it before either is imported.
    """
    # Its own layers take Apex's place, here as on a GPU without Apex.
    for message in ("Apex is not installed", "Transformer Engine and Apex are not installed"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    # It imports torch's compiler of extensions, which reports a CUDA toolkit without a GPU, as a login node has it.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # It announces itself twice at WARNING on the first step, though it stays disabled.
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
