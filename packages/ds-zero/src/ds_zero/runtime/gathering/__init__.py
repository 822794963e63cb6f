"""Stage 3 in forward and backward: when parameters are gathered and dropped."""
