"""Side-by-side speed measurements: contenders in separate processes that take turns.

`contenders.py` (our engine), `peer_pytorch.py` (the same networks in PyTorch, optional) and `worker.py` run in the worker
processes; `interleave.py` starts them and schedules the turns; `report.py` makes the tables and the plot.
"""
