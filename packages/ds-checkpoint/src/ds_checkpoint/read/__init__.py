"""Finding, opening and reading checkpoints, by name and range."""
