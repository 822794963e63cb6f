"""Ranks and their messages: topology, collectives, peer memory, and the watch over ranks that stand still."""
