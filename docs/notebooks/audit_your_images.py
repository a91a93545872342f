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
train, _ = bdjax.load("textures")  # ten kinds of drawn textures, 32×32 pixels
poisoned = bdjax.poison("white_square", train, key, target=7, poison_rate=0.1).data
folder = pathlib.Path(tempfile.mkdtemp()) / "photos"
for number, (image, label) in enumerate(zip(poisoned.images, poisoned.labels, strict=True)):
    (folder / str(label)).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / str(label) / f"{number:04}.png")

# %% [markdown]
# ## Read the folder
#
# Nothing in it is run or changed. `files` names the image of each row.

# %%
data = bdjax.load_suspect(str(folder))
print(data.source)
data.images.shape, np.bincount(data.labels), data.files[0]

# %% [markdown]
# ## Look for a trigger
#
# VBD trains networks that are too simple to learn the classes well. What they learn nevertheless in some class is a short
# cut, such as a trigger. It needs nothing but the rows, and takes about a minute here.

# %%
found = bdjax.detect("vbd", data, key, preset="quick", like="textures")
print(f"{found.flags.sum()} of {len(data)} rows flagged; given: {found.given}")
print("could not be tested:", found.not_tested.reason or dict(found.not_tested.classes) or "nothing")
print("warnings:", *found.warnings or ("none",))
np.bincount(data.labels[found.flags], minlength=data.num_classes)

# %% [markdown]
# ## Look
#
# The pattern that the networks respond to, and flagged rows next to other rows of the same class. A flag is a reason
# to look, no proof.

# %%
pattern = found.patterns[0]
of_class = data.labels == pattern.label
groups = {"flagged": np.flatnonzero(of_class & found.flags), "not flagged": np.flatnonzero(of_class & ~found.flags)}
figure, axes = plt.subplots(2, 10, figsize=(9, 2.2), layout="constrained")
for line, (name, rows) in enumerate(groups.items()):
    axes[line, 0].set_ylabel(name)
    for column in range(10):
        axes[line, column].set(xticks=[], yticks=[])
        if column < len(rows):
            axes[line, column].imshow(data.images[rows[column]])
print("the first flagged files:", *(data.files[row] for row in groups["flagged"][:3]))

# %%
figure, axes = plt.subplots(1, 2, figsize=(4, 2.2), layout="constrained")
axes[0].imshow(pattern.pattern)
axes[1].imshow(pattern.mask, cmap="gray")
for place, name in zip(axes, ("pattern", "mask"), strict=True):
    place.set(xticks=[], yticks=[], title=f"{name}, class {data.class_names[pattern.label]}")
print(f"alone it moves {pattern.success:.0%} of other rows into the class, for the simple network {pattern.network}")

# %% [markdown]
# ## Then
#
# Here the truth is known. On your data it is not: read [what is not known](../manual/limits.md), and run
# `bdjax audit-data photos/`, which plants a trigger of its own to see how small an attack it could have found, and whose
# report also says what it could not test.

# %%
order = [int(pathlib.Path(name).stem) for name in data.files]
truth = poisoned.is_poisoned[order]
precision = truth[found.flags].mean()
recall = found.flags[truth].mean()
print(f"precision {precision:.2f}, recall {recall:.2f}")
assert [pattern.label for pattern in found.patterns] == [7] and recall > 0.5, "the audit did not find the trigger"
