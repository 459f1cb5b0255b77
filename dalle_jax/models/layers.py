"""Declared parameters: plain trees of arrays, and of the logical axis names beside them."""

from typing import Any

import flax.linen as nn
import jax


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def init_module(module: nn.Module, key: jax.Array, *args: Any) -> dict[str, Any]:
    """Initial parameters of a Linen module as a nested dict of arrays without metadata.

    Args:
      module: has no collection but 'params'.
      key: PRNG key.
      *args: what the module is called with; jax.ShapeDtypeStruct will do, as nothing is computed
        but the parameters.
    """
    boxed = module.lazy_init(key, *args)['params']
    # The value itself, not unbox(): that would constrain its sharding if a mesh were in scope.
    return jax.tree.map(lambda leaf: leaf.value if _is_boxed(leaf) else leaf, boxed,
                        is_leaf=_is_boxed)


def module_axes(module: nn.Module, *args: Any) -> dict[str, Any]:
    """Logical axis names of a module's parameters, from shapes alone.

    Returns:
      A tree like init_module's with tuples (str or None, one a dimension) for leaves; all None for
      a parameter declared without `nn.with_logical_partitioning`.
    """
    def names(leaf):
        return tuple(leaf.names) if _is_boxed(leaf) else (None,) * leaf.ndim

    boxed = jax.eval_shape(lambda: module.lazy_init(jax.random.key(0), *args))['params']
    return jax.tree.map(names, boxed, is_leaf=_is_boxed)
