"""Shared by all folders of the configuration: errors, types of values, batch arithmetic, suggestions."""
