"""Sections about what ranks send to each other."""
