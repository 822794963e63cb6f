"""The commands `deepspeed` and `ds_report`."""
