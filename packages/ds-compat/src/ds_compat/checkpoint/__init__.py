"""Tags, files and whole weights of checkpoints."""
