"""Gradient scales of the resblocks and how they change (Ramesh et al. 2021, app. D.1).

Each of the 2 L branches has its own scale, because the size of activation gradients differs more
between the branches of a deep transformer than 16 bits can hold.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.models.scaling import Scale
from dalle_jax.training.partition import path_name

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


def with_flags(values: Any, flags: Any) -> Any:
    """What the model gets: a tree of scaling.Scale, or None without scales."""
    return jax.tree.map(Scale, values, flags) or None


def unscaled(grads: Any, values: Any) -> Any:
    """Gradients divided by the scale of the branch that they belong to, there float32.

    Args:
      grads: like the parameters.
      values: the scales, at the places of their branches in that tree; what is nowhere below one
        has no scale.
    """
    if isinstance(values, dict):
        return grads | {name: unscaled(grads[name], value) for name, value in values.items()}

    def one(g):
        return g.astype(jnp.float32) / values.reshape(values.shape + (1,) * (g.ndim - values.ndim))
    return jax.tree.map(one, grads)


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


def vector(tree: Any) -> jax.Array:
    """The entries of a tree like the scales as one array [branches]; `names` names them."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def names(tree: Any) -> list[str]:
    """The branches in the order of `vector`, such as '07/mlp', layer and kind."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *_, part, layer, branch = path_name(path).split('/')
        stack = functools.reduce(lambda t, entry: t[entry.key], path[:-3], tree)
        if part == 'body':
            layers = range(int(layer), leaf.size * len(stack['body']), len(stack['body']))
        else:
            before = jax.tree.leaves(stack['body'])[0].size * len(stack['body']) \
                if 'body' in stack else 0
            layers = [before + int(layer)]
        found += [f'{layer:02d}/{branch}' for layer in layers]
    return found
