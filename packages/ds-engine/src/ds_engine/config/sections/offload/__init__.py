"""Sections about where training state is kept."""
