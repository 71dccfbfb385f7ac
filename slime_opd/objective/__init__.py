"""The objective: streams of losses over tokens. Pure functions on tensors."""
