"""`deepspeed.comm` and `deepspeed.utils.groups`."""
