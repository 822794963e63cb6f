"""Sections that store weights in few bits or prune them."""
