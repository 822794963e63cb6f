"""`deepspeed.zero`, and what code asks of parameters and models that ZeRO divides."""
