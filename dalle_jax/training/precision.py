"""Gradient scales of the resblocks and how they change (Ramesh et al. 2021, app. D.1).

Each of the 2 L branches has its own scale, because the size of activation gradients differs more
between the branches of a deep transformer than 16 bits can hold.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.models.scaling import Scale

# In units of M: the loss is divided by all M examples of a step, and the scales make up for it. In
# the paper M is the number of GPUs, each of which has one example.
INITIAL, LEAST, MOST = 2.0**13, 2.0**7, 2.0**24
GROWTH = 2**(1 / 1000)  # after a step in which all gradients of the branch's parameters are finite
SHRINK = 2**-0.5  # after any other
WINDOW = 125  # steps in which a scale is not divided twice


class Scales(NamedTuple):
    """Trees like transformer.branches.

    Attributes:
      value: float32, the scales.
      since: int32, steps since the scale was divided, at most WINDOW.
    """

    value: Any
    since: Any


def init(branches: Any, examples: int) -> Scales:
    """The scales before the first step.

    Args:
      branches: tree of shapes, see transformer.branches.
      examples: M, of a step.
    """
    def tree(value, dtype):
        return jax.tree.map(lambda shape: jnp.full(shape, value, dtype), branches,
                            is_leaf=lambda shape: isinstance(shape, tuple))
    return Scales(tree(INITIAL * examples, jnp.float32), tree(WINDOW, jnp.int32))


def with_flags(scales: Scales, flags: Any) -> Any:
    """What the model gets: a tree of scaling.Scale."""
    return jax.tree.map(Scale, scales.value, flags)


def updated(scales: Scales, counts: Any, examples: int) -> Scales:
    """The scales after a step.

    Args:
      counts: tree like the scales, of each branch the entries of its parameters' gradients that
        were not finite.
      examples: M.
    """
    def one(value, since, count):
        since = jnp.minimum(since + 1, WINDOW)
        divide = (count > 0) & (since == WINDOW)
        value = jnp.where(count > 0, jnp.where(divide, SHRINK, 1.0), GROWTH) * value
        return (jnp.clip(value, LEAST * examples, MOST * examples),
                jnp.where(divide, 0, since))

    pairs = jax.tree.map(one, scales.value, scales.since, counts)
    value, since = jax.tree.transpose(jax.tree.structure(scales.value), jax.tree.structure((0, 0)),
                                      pairs)
    return Scales(value, since)
