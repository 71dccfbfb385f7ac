"""Models, trainers and checkpoints of Megatron-core. To import any file of it silences Megatron's notes about what is not installed."""

from slime_opd.observe.library_noise import silence_megatron

silence_megatron()
