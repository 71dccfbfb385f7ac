"""Checkpoints on disk: where they lie, which is meant, whether they are whole. Free of torch, Megatron and Ray."""
