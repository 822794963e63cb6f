"""Optimizer states that are in memory only while they are stepped."""
