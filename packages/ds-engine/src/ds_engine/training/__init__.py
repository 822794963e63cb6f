"""What runs in the engine's loop beside the optimizer: accumulation, pacing, progress, curves, timing."""
