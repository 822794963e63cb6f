"""The layer under DeepSpeed's names, for ds-compat: parameters in state dicts, marks, groups of optimizers."""
