"""From a rollout to what each data-parallel rank trains on: advantages, weights, denominators, and the packing plan."""
