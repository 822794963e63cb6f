"""`verify`: compares sharded and plain training. Nothing that runs during training imports it."""
