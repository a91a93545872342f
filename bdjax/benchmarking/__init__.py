"""Side by side measurements: contenders in processes of their own, taking turns.

`contenders.py` (our engine), `peer_pytorch.py` (the same networks in PyTorch, optional) and `worker.py` run in the
processes; `interleave.py` starts them and gives out the turns; `operations.py` counts, `report.py` prints and draws.
"""
