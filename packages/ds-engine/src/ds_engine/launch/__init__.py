"""Starting the ranks of a job on this machine. Nothing here imports torch: `ds` answers at once.

`plan.py` decides what to start (pure), `supervise.py` starts it and watches, `rank.py` is one process,
`output.py` what becomes of its output, `failure.py` says which rank failed first and what to do (pure),
`devices.py` and `machine.py` look at the machine.
"""
