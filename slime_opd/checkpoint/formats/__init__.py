"""The contents of checkpoints: torch_dist and Hugging Face, read, written, converted and verified."""

import slime_opd.model  # noqa: F401  before the first import of megatron
