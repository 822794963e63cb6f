"""`deepspeed.pipe`, on top of ds_pipe and `ds_engine.PipelineEngine`."""
