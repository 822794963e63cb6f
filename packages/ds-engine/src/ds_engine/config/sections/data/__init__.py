"""Sections that choose samples and tokens."""
