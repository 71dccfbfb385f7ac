"""The contents of checkpoints: reads, writes, converts and verifies torch_dist and Hugging Face checkpoints."""

import slime_opd.model  # noqa: F401  before the first import of megatron
