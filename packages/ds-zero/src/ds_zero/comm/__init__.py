"""Ranks and their messages: topology, collectives, peer memory, and detection of stalled ranks."""
