"""How ranks on one machine exchange tensors without messages."""
