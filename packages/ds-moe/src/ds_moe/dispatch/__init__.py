"""Moves tokens to their experts and back: plans as pure functions, permutations with gradients, messages."""
