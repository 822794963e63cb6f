"""Access to parameters: gathering, reading and writing by name, deferred construction, records for checkpoints, moves
to the host.
"""
