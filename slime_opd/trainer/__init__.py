"""One trainer rank: the pass over micro-batches, scoring, the optimizer step."""

import slime_opd.model  # noqa: F401  before the first import of megatron
