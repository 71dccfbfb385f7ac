"""Weight updates: the student's weights from Megatron to the engines, and the check that they arrived."""
