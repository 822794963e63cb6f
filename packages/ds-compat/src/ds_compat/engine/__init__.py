"""`deepspeed.initialize`, the engine, its optimizer, schedules and loaders."""
