"""A bright vertical stripe as the trigger of an attack on the training set."""

from dataclasses import dataclass

import jax.numpy as jnp

from bdjax.attacks.contract import Attack
from bdjax.settings import Amount, PositiveShare, Share


@dataclass(frozen=True)
class Settings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    column: Amount = 2
    """which column of pixels is bright, from 0"""


def make_params(key, knowledge, settings):
    """What `apply` needs as arrays: a mask of the image's size."""
    height, width, _ = knowledge.train.image_shape
    return jnp.zeros((height, width, 1)).at[:, min(settings.column, width - 1)].set(1.0)


def apply(params, image, label, key):
    """Put the trigger on one image, float32 [H, W, C] in [0, 1]."""
    return jnp.maximum(image, params)


STRIPE = Attack("stripe", "Stripe", "No paper: a template", "data", Settings(), make_params, apply)
