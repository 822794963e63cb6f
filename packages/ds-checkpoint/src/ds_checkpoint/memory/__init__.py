"""Checkpoints in the memory of hosts: each host keeps the part of its own ranks and copies of parts of other hosts."""
