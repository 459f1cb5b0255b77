"""The transformer one image state at a time: caches, prefill and the cached step.

A layer's cache holds keys and values of earlier image states in S slots. A column layer has a
lane of slots, one a row, for each column, so that a step reads a contiguous lane; other layers
have a ring of as many states as the pattern reaches. Keys and values of the text are computed once
for a caption and shared by its candidates.

B captions, N candidates of one, H heads, D head size, d width; T text, I image and L = T + I
states; S slots.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dalle_jax.models import attention
from dalle_jax.models.context import unconstrained
from dalle_jax.models.layers import contract, layer_norm, tiled
from dalle_jax.models.patterns import Layout, offsets
from dalle_jax.models.transformer import BlockConfig, by_place, run_layers


def cache_shape(kind: str, layout: Layout) -> tuple[tuple[int, ...], int]:
    """Lanes, () or (columns,), and slots of a layer's cache."""
    if kind == 'column':
        return (layout.columns,), layout.rows
    return (), max(1, min(int(offsets(kind, layout)[-1]), layout.image - 1))


def cache_slots(kind: str, layout: Layout, count: int) -> np.ndarray:
    """Which image state each slot holds after the first `count` were written: int [(lanes,) S].

    Negative where a slot has not been written yet.
    """
    lanes, slots = cache_shape(kind, layout)
    slot = np.arange(slots)
    if kind == 'column':
        state = slot * layout.columns + np.arange(*lanes)[:, None]
        return np.where(state < count, state, -1)
    return count - 1 - (count - 1 - slot) % slots


def cache_address(kind: str, layout: Layout, position: jax.Array
                  ) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Lane, () or (column,), and slot of the image state at `position`; may be traced."""
    if kind == 'column':
        return (position % layout.columns,), position // layout.columns
    return (), position % cache_shape(kind, layout)[1]


def cache_visible(kind: str, layout: Layout, position: jax.Array) -> jax.Array:
    """Which slots of its lane the image state at `position` sees: bool [S].

    For a cache that holds the states before it, but not yet itself.
    """
    slots = cache_shape(kind, layout)[1]
    slot = jnp.arange(slots)
    if kind == 'column':
        return slot < position // layout.columns
    behind = (position - 1 - slot) % slots + 1
    in_pattern = np.isin(np.arange(slots + 1), offsets(kind, layout))
    return (behind <= position) & jnp.asarray(in_pattern)[behind]


def attend_cached(q: jax.Array, k: jax.Array, v: jax.Array, text: Sequence[jax.Array],
                  cache: Sequence[jax.Array], visible: jax.Array) -> jax.Array:
    """Attention of one new image state of each of N candidates: to the text, its cache and itself.

    Args:
      q, k, v: [B, H, N, D], of the new state.
      text: keys and values [B, H, T, D] of the caption, shared by its candidates.
      cache: keys and values [B, H, N, S, D], the lane of the state at hand.
      visible: bool [S].

    Returns:
      [B, H, N, D].
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    on_text = scale * contract('bhnd,bhtd->bhnt', q, text[0], dtype)
    on_cache = scale * contract('bhnd,bhnsd->bhns', q, cache[0], dtype)
    on_cache = jnp.where(visible[None, None, None], on_cache, attention.MASKED)
    on_self = scale * contract('bhnd,bhnd->bhn', q, k, dtype)[..., None]
    top = jnp.maximum(jnp.maximum(on_text.max(-1, keepdims=True),
                                  on_cache.max(-1, keepdims=True)), on_self)
    on_text, on_cache, on_self = (jnp.exp(x - top) for x in (on_text, on_cache, on_self))
    total = on_text.sum(-1, keepdims=True) + on_cache.sum(-1, keepdims=True) + on_self
    out = contract('bhnt,bhtd->bhnd', on_text, text[1], dtype) + on_self * v
    out += contract('bhns,bhnsd->bhnd', on_cache, cache[1], dtype)
    return (out / total).astype(dtype)


def tiled_stack(params: Any, rows: int) -> Any:
    """A stack's parameters for `step` on a CPU: kernels as `layers.tiled`, for B N rows."""
    def walk(name, tree):
        if 'kernel' not in tree:
            return {key: walk(key, x) if isinstance(x, dict) else x for key, x in tree.items()}
        kernel = tree['kernel'].swapaxes(-1, -2) if name == 'down' else tree['kernel']
        return {'tiles': tiled(kernel, rows), 'bias': tree['bias']}

    return walk('', params)


def prefill(params: Any, config: BlockConfig, x: jax.Array, *, dtype: Any = jnp.float32,
            constrain: Any = unconstrained) -> tuple[jax.Array, Any]:
    """All layers for the text states [B, T, d], which see nothing but text.

    Returns:
      what `forward` returns of them, float32 [B, T, d], and their keys and values: a tree {'body':
      {'0'..'3'}, 'tail': {'0'..}} of pairs of arrays [B, H, T, D] in `dtype`, in the body with a
      leading axis [groups].
    """
    def attend(kind, place, layer, q, k, v):
        del kind, place, layer
        return attention.attend('causal', q, k, v), (k, v)

    x, kept = run_layers(params, config, x, attend, dtype, constrain=constrain)
    return layer_norm(x, params['norm'], config.eps), kept


def prefill_image(params: Any, config: BlockConfig, x: jax.Array, count: int, candidates: int, *,
                  dtype: Any = jnp.float32, constrain: Any = unconstrained
                  ) -> tuple[jax.Array, Any, 'Caches']:
    """All layers for text and image states, from which candidates go on after `count` of them.

    Args:
      x: [B, L, d]; what follows the first `count` image states, at least 1, does not matter.

    Returns:
      what `forward` returns, float32 [B, L, d]; keys and values of the text as of `prefill`; and
      caches for `step` at position `count`, the same for all candidates.
    """
    text = config.layout.text

    def attend(kind, place, layer, q, k, v):
        del place, layer
        return attention.attend(kind, q, k, v, config.layout, config.attention, constrain), (k, v)

    x, kept = run_layers(params, config, x, attend, dtype, constrain=constrain)

    def pairs(function):
        return by_place(config, lambda place, kind: tuple(
            function(kind, a) for a in kept[place[0]][place[1]]))

    def past(kind, a):  # [..., B, H, L, D]: all but the newest state is in its slot
        slots = cache_slots(kind, config.layout, count - 1)
        a = jnp.take(a, text + slots.clip(0), axis=-2)  # [..., B, H, (lanes,) S, D]
        if slots.ndim > 1:
            a = jnp.moveaxis(a, -3, -5)
            slots = slots[:, None, None]
        written = (slots >= 0)[..., None]
        a = repeated(jnp.where(written.reshape((1,) * (a.ndim - written.ndim) + written.shape),
                               a, 0), -3)
        return a.reshape(*a.shape[:-5], *_several(a.shape[-5:-2]), *a.shape[-2:])

    def repeated(a, axis):
        return jnp.repeat(jnp.expand_dims(a, axis), candidates, axis)

    caches = Caches(pairs(past),
                    pairs(lambda kind, a: repeated(a[..., text + count - 1, :], -2)))
    return (layer_norm(x, params['norm'], config.eps), pairs(lambda kind, a: a[..., :text, :]),
            caches)


def _several(extents):
    """Those that are not 1."""
    return tuple(n for n in extents if n > 1)


class Caches(NamedTuple):
    """Keys and values of the image states so far, in trees like `prefill`'s.

    Attributes:
      past: all but the last state's: pairs of arrays [B, H, N, S, D] with slots as `cache_address`
        says, behind an axis of lanes if there are any and, in the body, one of groups. Of B, H and
        N, those that are 1 have no axis: CPUs would take them out in every step, in a copy.
      last: the last state's: pairs of arrays [B, H, N, D], in the body behind an axis of groups.
    """

    past: Any
    last: Any


def empty_caches(config: BlockConfig, batch: int, candidates: int, dtype: Any = jnp.float32
                 ) -> Caches:
    """Caches for `step` in front of the first image state, of `candidates` images a caption."""
    heads, size = (batch, config.heads, candidates), config.width // config.heads

    def pair(place, *shape):
        shape = (config.groups, *shape) if place[0] == 'body' else shape
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def past(place, kind):
        lanes, slots = cache_shape(kind, config.layout)
        return pair(place, *lanes, *_several(heads), slots, size)

    return Caches(by_place(config, past),
                  by_place(config, lambda place, kind: pair(place, *heads, size)))


def step(params: Any, config: BlockConfig, x: jax.Array, position: jax.Array, text: Any,
         caches: Caches, *, dtype: Any = jnp.float32, constrain: Any = unconstrained
         ) -> tuple[jax.Array, Caches]:
    """All layers for the next image state of each of N candidates.

    A step first writes the state before it into the caches; the layers then only read them, and
    the new keys and values leave the layers' scan as its outputs. So a step moves one state's worth
    of cache. Written by the layers or after them, the compiler would copy all of it.

    Args:
      x: [B, N, d].
      position: int32 scalar, index of the image state; may be traced.
      text: from `prefill`.
      caches: from `empty_caches` or the step before.
      constrain: Context.constrain.

    Returns:
      float32 [B, N, d] behind the final layernorm, and the caches.
    """
    def write(place, kind):
        part, name = place
        # In front of position 0 these are zeros, and so is what they overwrite.
        lane, slot = cache_address(kind, config.layout, position - 1)

        def one(past, last):
            groups, heads, size = last.shape[:-4], _several(last.shape[-4:-1]), last.shape[-1]
            return lax.dynamic_update_slice(
                past, last.reshape(*groups, *(1 for _ in lane), *heads, 1, size),
                (*(0 for _ in groups), *lane, *(0 for _ in heads), slot, 0))

        return tuple(map(one, caches.past[part][name], caches.last[part][name]))

    past = by_place(config, write)

    def attend(kind, place, layer, q, k, v):
        part, name = place
        q, k, v = map(at_caches, (q, k, v))
        lane, _ = cache_address(kind, config.layout, position)
        cache = [_at(x, (*layer, *lane)) for x in past[part][name]]
        out = attend_cached(
            q, k, v, [_at(x, layer) for x in text[part][name]],
            [x.reshape(*q.shape[:3], *x.shape[-2:]) for x in cache],
            cache_visible(kind, config.layout, position))
        return at_matrices(out, ('batch', 'heads', None, None)), (k, v)

    def at_caches(a):
        return constrain(a, ('batch', 'heads', None, None))

    # A few states are less than a layer: where matrices are divided over 'fsdp', the states go to
    # them, instead of them to the states as in training (Pope et al. 2022, sec. 3.2.2).
    def at_matrices(a, axes):
        return constrain(a, ('copies', *axes[1:]))

    x, last = run_layers(params, config, x, attend, dtype, constrain=at_matrices)
    x = constrain(layer_norm(x, params['norm'], config.eps), ('batch', None, None))
    return x, Caches(past, last)


def _at(stack: jax.Array, index: tuple) -> jax.Array:
    """stack[index] as one slice."""
    if not index:
        return stack
    rest = stack.shape[len(index):]
    return lax.dynamic_slice(stack, (*index, *(0 for _ in rest)),
                             (*(1 for _ in index), *rest)).reshape(rest)
