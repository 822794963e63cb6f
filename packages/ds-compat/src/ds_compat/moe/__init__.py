"""`deepspeed.moe`, on top of ds_moe."""
