"""`plan`: memory and messages of a job before it starts. Nothing that runs during training imports it."""
