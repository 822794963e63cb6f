"""Training state on a disk."""
