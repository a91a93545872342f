"""The named choices and the defaults that settings offer and whose code needs JAX: --help and a refused flag read them without
it. Plugins may import the choices of networks from `bdjax.models` as well."""

from typing import Literal

Layout = Literal["vmap", "map", "unrolled"]
"""How members are laid out in a compiled call: `bdjax/training/ensemble.py`."""
Lowering = Literal["native", "patches", "shifted", "shifted_bfloat16"]
"""How convolutions are computed: `bdjax/models/layers.py`."""
ComputeDtype = Literal["float32", "bfloat16"]
Schedule = Literal["plateau", "cosine", "constant", "steps", "triangle"]
Optimiser = Literal["adam", "sgd"]
Recipe = Literal["", "speedrun"]
"""Named recipes, see `bdjax/training/recipes.py`; "" for none."""
Augmentation = Literal["none", "crop", "crop_flip", "reflect", "reflect_flip"]
RateOf = Literal["all", "candidates"]
"""The rows that a poisoning rate is a share of: `bdjax/attacks/poisoning.py`."""
Direction = Literal["teacher_student", "student_teacher"]
"""Of a KL divergence: `bdjax/losses.py`."""
Aggregation = Literal["mean", "median", "trimmed_mean"]
VoteSpace = Literal["logits", "probabilities"]
Tie = Literal["lowest", "soft"]

PROBE_SECONDS = 20.0
"""Default time limit of the measurement of layouts and lowerings."""
QUERY_BATCH = 256
"""Default of the most images that a black box gets in one call."""
