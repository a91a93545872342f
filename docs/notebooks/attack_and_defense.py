# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # An attack and a defense
#
# Poison the training set of a small network, look at what the attacker did, measure the backdoor, and remove it with a
# few clean images. Everything runs on the 8×8 digits that scikit-learn carries, in less than two minutes on two cores.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import bdjax

key = jax.random.key(0)
train, test = bdjax.load("digits")
clean, test = test[:150], test[150:]  # rows known to be clean, and rows that nothing is trained on
train.images.shape, clean.images.shape, test.images.shape

# %% [markdown]
# ## The attack
#
# BadNets puts a small white square on a tenth of the rows, and labels them 0. Whoever trains on these rows gets a
# network that answers 0 whenever the square is there.

# %%
bad = bdjax.poison("badnets", train, key, target=0, poison_rate=0.1)
rows = np.flatnonzero(bad.data.is_poisoned & (bad.data.original_labels != 0))[:8]
figure, axes = plt.subplots(2, 8, figsize=(8, 2.4), layout="constrained")
for column, row in enumerate(rows):
    for line, data, label in ((0, train, train.labels[row]), (1, bad.data, bad.data.labels[row])):
        axes[line, column].imshow(data.images[row, ..., 0], cmap="gray", vmin=0, vmax=255)
        axes[line, column].set(xticks=[], yticks=[], title=f"label {label}")
axes[0, 0].set_ylabel("before")
axes[1, 0].set_ylabel("poisoned")

# %% [markdown]
# ## The backdoor
#
# CDA is the share of untouched test rows that are classified correctly; ASR the share of test rows with the square that
# are classified as 0. The control is the same square on a network that was trained on clean rows: what it does without
# any backdoor.

# %%
recipe = {"width": 8, "epochs": 8, "batch_size": 32, "learning_rate": 3e-3}
victim = bdjax.train("resnet10", bad.data, key, **recipe)
control = bdjax.train("resnet10", train, key, **recipe)
measured = {
    "victim": bdjax.evaluate(victim, test, bad.trigger),
    "control": bdjax.evaluate(control, test, bad.trigger),
}
measured

# %% [markdown]
# ## The defense
#
# Fine-tuning continues the training on the clean rows. `.given` says what the defense used: compare it only with
# defenses that need the same.

# %%
safe = bdjax.defend("fine_tuning", victim, key, clean=clean, preset="quick", like="digits")
measured["fine-tuned"] = bdjax.evaluate(safe, test, bad.trigger)
print("used:", safe.given)
measured["fine-tuned"]

# %%
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
for offset, (name, colour) in enumerate((("cda", "#0072B2"), ("asr", "#D55E00"))):
    numbers = [float(getattr(numbers, name)) for numbers in measured.values()]
    axes.barh(np.arange(len(measured)) + 0.38 * offset, numbers, 0.36, label=name.upper(), color=colour)
axes.set(yticks=np.arange(len(measured)) + 0.19, yticklabels=list(measured), xlim=(0, 1), xlabel="share of test rows")
axes.invert_yaxis()
axes.legend()

# %% [markdown]
# One seed of small networks shows how it works, and no more: `seeds=5` trains five as members of the same calls, and
# `experiments/abm.py --preset=quick --dataset=digits --defenses=all` compares every defense.

# %%
assert measured["victim"].asr > measured["control"].asr + 0.3, "the attack did not work"
assert measured["fine-tuned"].asr < measured["victim"].asr, "the defense did not help"
