"""Parameters by name: gathered, read, written, constructed late, saved as records, moved to the host."""
