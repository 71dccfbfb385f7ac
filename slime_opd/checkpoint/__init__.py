"""Checkpoint directories, without torch: finding, checking and publishing checkpoints; where a run starts from."""
