"""Megatron models: builder, layers, model families, process groups, and the device layer for machines without CUDA.

Importing it silences Megatron's warnings about packages that are not installed, and hides a Transformer Engine that
cannot be used.
"""

from slime_opd.config.machine import hide_unusable_engine
from slime_opd.observe.library_noise import silence_megatron

silence_megatron()
hide_unusable_engine()
