"""Optimizers that are more than a class of torch or ds_core: muP, and those that reduce gradients themselves."""
