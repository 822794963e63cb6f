"""Activations in host memory or on a disk between forward and backward."""
