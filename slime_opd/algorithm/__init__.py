"""Reinforcement learning: advantage estimators, policy losses, KL estimates, reductions. Pure functions on tensors."""
