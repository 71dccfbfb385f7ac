"""The output layer in chunks: vocabulary-parallel distributions, the objective and its gradient.

Imports no Megatron.
"""
