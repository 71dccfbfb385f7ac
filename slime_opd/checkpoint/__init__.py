"""Checkpoint directories: finding, verifying and publishing checkpoints, and where a run starts from. Without torch, but for `formats`."""
