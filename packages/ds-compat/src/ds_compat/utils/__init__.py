"""Logging and small functions."""
