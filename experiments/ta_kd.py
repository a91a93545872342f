"""TA-KD: seven backdoored teachers, two votes, the aggregated model and the student (Heydari et al. 2025).

python experiments/ta_kd.py                                     # digits
python experiments/ta_kd.py --dataset=mnist                     # narrower networks and fewer rows than in the paper
python experiments/ta_kd.py --dataset=cifar10 --preset=paper    # the paper to the letter: for a GPU
python experiments/ta_kd.py --preset=strong                     # the same attack, a better defender
python experiments/ta_kd.py --teachers a/ b.safetensors:resnet18_cifar c.onnx   # third-party teachers, no attack
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("ta-kd")
