"""Where each tensor is stored within given amounts of memory, so that the predicted step takes the least time."""
