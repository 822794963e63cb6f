"""Starts the ranks of a job on this machine. Nothing here imports torch, so `ds` starts fast.

`plan.py` decides what to start (pure), `supervise.py` starts it and watches, `rank.py` is one process,
`output.py` forwards its output, `failure.py` determines which rank failed first and suggests a remedy (pure),
`devices.py` and `machine.py` inspect the machine.
"""
