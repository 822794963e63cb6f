"""Gradients: from autograd through the reduction to the optimizer's shards, their scale and their norm."""
