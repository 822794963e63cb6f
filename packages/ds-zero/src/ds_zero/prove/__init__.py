"""`verify`: sharded and plain training beside each other. Nothing that runs during training imports it."""
