"""The section `zero_optimization`."""
