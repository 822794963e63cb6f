"""Names, files and whole weights of checkpoints."""
