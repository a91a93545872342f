"""Audit of models: is there a backdoor, into which class, and what does its trigger look like?

    python experiments/audit_model.py --model=FOLDER                # a model folder for the digits, or a saved model
    python experiments/audit_model.py --model=model.safetensors:resnet18_cifar --dataset=cifar10
    python experiments/audit_model.py --model=FOLDER --members 2 5  # two of the models that a folder holds
    python experiments/audit_model.py --model=model.onnx --dataset=photos/      # a black box, with your own clean rows

Clean rows are all that is needed beside the model: --dataset names them. Triggers are searched by Neural Cleanse (Wang et al.
2019), on the model and on clean control networks of its architecture that are trained here. The exit status is 3 if a trigger
was found, 0 if nothing was found, 4 if no model could be tested, 2 for input that cannot be used. The same command continues an
interrupted run, and ends at the same numbers.
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("audit-model")
