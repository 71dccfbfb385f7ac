"""Megatron models: building one, its layers and attention, the families, the device layer, process groups.

Importing it silences Megatron's notes about packages that are not installed, and hides a Transformer Engine that cannot be used.
"""

from slime_opd.config.machine import hide_unusable_engine
from slime_opd.observe.library_noise import silence_megatron

silence_megatron()
hide_unusable_engine()
