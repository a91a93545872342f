"""Grids: many experiments, attacks, defenses and seeds as jobs, here or under Slurm; results as tables.

python experiments/grid.py grid.toml                            # one job after another on this machine; see docs/grid.md
python experiments/grid.py grid.toml --workers=2                # two at a time, which share the cores
python experiments/grid.py grid.toml --executor=slurm           # in Slurm's queue
python experiments/grid.py grid.toml --plan                     # print the jobs, and start none
python experiments/grid.py collect runs/grid/grid               # tables, ranks and figures; also of any other runs
python experiments/grid.py collect runs/ --format=parquet       # a row for each number
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("grid")
