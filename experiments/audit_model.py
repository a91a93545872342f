"""Audit of models: is there a backdoor, into which class, and what does its trigger look like?

python experiments/audit_model.py --model=FOLDER                # a model folder for the digits, or a saved model
python experiments/audit_model.py --model=model.safetensors:resnet18_cifar --dataset=cifar10
python experiments/audit_model.py --model=FOLDER --members 2 5  # two of the models that a folder holds
python experiments/audit_model.py --model=model.onnx --dataset=photos/      # a black box, with your own clean rows
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("audit-model")
