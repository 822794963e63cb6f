"""Parts of the engine's loop other than the optimizer: accumulation, pacing, progress, curves, timing."""
