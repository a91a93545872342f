"""Gate: compare the verdict.json of a run with limits, as a step of continuous integration does.

python experiments/gate.py runs/lfd/digits-quick/evidence/verdict.json --max-asr=0.1 --min-cda=0.9
python experiments/gate.py runs/vbd/photos-quick/evidence/verdict.json --require-verdict="nothing found"
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("gate")
