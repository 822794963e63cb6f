"""Starts the ranks of a job on several machines.

`prepare.py` makes the plan, `job.py` holds it (pure). `connect.py` starts an agent on each machine (`transport.py`),
compares the machines (`facts.py`), and has the supervisor run the job. `ranks.py` is the launcher's end of each
machine, `agent.py` the other end; `link.py` and `frames.py` carry what they say.
"""
