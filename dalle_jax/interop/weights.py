"""What converters share: the checks of published arrays, and trees of parameters from paths."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np


def check_names(kind: str, found: Iterable[str], expected: Iterable[str],
                harmless: Iterable[str] = ()) -> None:
    """Raises ValueError unless exactly the expected arrays, or besides them harmless ones, exist.

    Args:
      kind: what messages call the model.
    """
    found, expected = set(found), set(expected)
    missing, unexpected = sorted(expected - found), sorted(found - expected - set(harmless))
    if missing or unexpected:
        parts = [f'{what} {_some(names)}' for what, names in (
            ('lacking', missing), ('not known', unexpected)) if names]
        raise ValueError(f'no {kind}: {"; ".join(parts)}. Give the weights of a {kind}')


def take(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of this name as float32.

    Raises:
      ValueError: it has another shape, or holds anything but finite numbers.
    """
    array = arrays[name]
    if array.shape != shape:
        raise ValueError(f'{name} has the shape {list(array.shape)}, and the other arrays ask for '
                         f'{list(shape)}: weights of another model')
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f'{name} holds {array.dtype} where weights are floating-point numbers')
    array = np.asarray(array, np.float32)
    bad = array.size - np.isfinite(array).sum()
    if bad:
        raise ValueError(f'{name} holds {bad} values that are not finite (NaN or infinite): the '
                         'weights are damaged; download them again')
    return array


def need(arrays: Mapping[str, np.ndarray], kind: str, dimensions: Mapping[str, int]) -> None:
    """Raises ValueError unless the arrays that tell the sizes are there and have these ranks."""
    for name, ndim in dimensions.items():
        if name not in arrays:
            raise ValueError(f'no {kind}: {name} is missing; it has {_some(sorted(arrays))}')
        if arrays[name].ndim != ndim:
            raise ValueError(f'no {kind}: {name} has the shape {list(arrays[name].shape)}, not '
                             f'{ndim} dimensions')


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """'a/b' -> value as a tree of dicts."""
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split('/')
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree


def _some(names):
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return (', '.join(names[:4]) or 'nothing') + more
