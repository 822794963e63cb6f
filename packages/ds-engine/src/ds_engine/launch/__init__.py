"""Starts the ranks of a job. Nothing here imports torch, so `ds` starts fast.

`plan.py` decides what to start on a machine (pure), `supervise.py` starts it and watches. It sees the ranks as a crew
(`crew.py`): processes of this machine (`rank.py`), or those of several machines (`remote/`). `console.py` and
`output.py` pass their output on, `failure.py` determines which rank failed first and suggests a remedy (pure),
`devices.py`, `machine.py` and `network.py` inspect the machine.
"""
