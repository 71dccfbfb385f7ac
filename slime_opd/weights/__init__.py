"""The student's weights from Megatron to the engines, and the proof that they arrived."""
