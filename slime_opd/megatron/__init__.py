"""Models, trainers and checkpoints of Megatron-core.

To import any file of it silences Megatron's notes about what is not installed, and hides a Transformer Engine that cannot be used.
"""

from slime_opd.config.machine import hide_unusable_engine
from slime_opd.observe.library_noise import silence_megatron

silence_megatron()
hide_unusable_engine()
