"""Finding, opening and reading, by name and range."""
