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
# # An audit of your own images
#
# A folder with a sub-folder for each class, from someone else: which images carry a hidden trigger? This notebook makes
# such a folder, so that the answer is known; to audit yours, set `folder` to it and leave out the first cell.

# %%
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import bdjax

key = jax.random.key(0)
train, test = bdjax.load("digits")
poisoned = bdjax.poison("badnets", train, key, target=7, poison_rate=0.1).data
folder = pathlib.Path(tempfile.mkdtemp()) / "photos"
for number, (image, label) in enumerate(zip(poisoned.images, poisoned.labels, strict=True)):
    (folder / str(label)).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0]).save(folder / str(label) / f"{number:04}.png")

# %% [markdown]
# ## Read the folder
#
# Nothing in it is run or changed. `files` names the image of each row.

# %%
data = bdjax.load_suspect(str(folder))
print(data.source)
data.images.shape, np.bincount(data.labels), data.files[0]

# %% [markdown]
# ## Train on it, and look for rows that differ from their class
#
# Activation clustering trains nothing itself: it splits the activations of each class in two, and flags the smaller
# part where it is too small or too far away to be chance.

# %%
victim = bdjax.train("resnet10", data, key, width=8, epochs=8, batch_size=32, learning_rate=3e-3)
found = bdjax.detect("activation_clustering", data, key, victim=victim)
print(f"{found.flags.sum()} of {len(data)} rows flagged; given: {found.given}")
flagged_classes = np.bincount(data.labels[found.flags], minlength=data.num_classes)
flagged_classes

# %% [markdown]
# ## Look
#
# The class with the most flagged rows, the flagged rows first. A flag is a reason to look, no proof.

# %%
label = int(flagged_classes.argmax())
of_class = data.labels == label
groups = {"flagged": np.flatnonzero(of_class & found.flags), "not flagged": np.flatnonzero(of_class & ~found.flags)}
figure, axes = plt.subplots(2, 10, figsize=(9, 2.2), layout="constrained")
for line, (name, rows) in enumerate(groups.items()):
    axes[line, 0].set_ylabel(name)
    for column in range(10):
        axes[line, column].set(xticks=[], yticks=[])
        if column < len(rows):
            axes[line, column].imshow(data.images[rows[column], ..., 0], cmap="gray", vmin=0, vmax=255)
print("the first flagged files:", *(data.files[row] for row in groups["flagged"][:3]))

# %% [markdown]
# What the flagged rows share that the others do not: the mean image of each group, and their difference. The trigger
# stands out.

# %%
means = [data.images[rows, ..., 0].mean(axis=0) for rows in groups.values()]
figure, axes = plt.subplots(1, 3, figsize=(6, 2.2), layout="constrained")
for place, picture, name in zip(axes, (*means, means[0] - means[1]), (*groups, "difference"), strict=True):
    is_difference = name == "difference"
    place.imshow(picture, cmap="PuOr" if is_difference else "gray", vmin=-255 if is_difference else 0, vmax=255)
    place.set(xticks=[], yticks=[], title=name)

# %% [markdown]
# ## Then
#
# Here the truth is known. On your data it is not: read [what is not known](../manual/limits.md), and run
# `experiments/vbd.py --dataset=photos/`, whose report also says what it could not test.

# %%
order = [int(pathlib.Path(name).stem) for name in data.files]
truth = poisoned.is_poisoned[order]
precision = truth[found.flags].mean()
recall = found.flags[truth].mean()
print(f"precision {precision:.2f}, recall {recall:.2f}")
assert label == 7 and recall > 0.5, "the audit did not find the trigger"
