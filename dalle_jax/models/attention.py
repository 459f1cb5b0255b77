"""Causal attention over text and image states with the sparse patterns of DALL-E.

Ramesh et al. 2021, app. B.1; the patterns are those of patterns.py. `attend` computes them in dense
blocks, touching little more than what a pattern allows, or by other means.

B batch, H heads, D head size, L = T + I states, T text, I image; R rows, C columns; q query, k key;
n blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dalle_jax.models import kernels
from dalle_jax.models.context import unconstrained
from dalle_jax.models.layers import contract
from dalle_jax.models.patterns import PATTERNS, Layout, mask, transposed, visible, window_reach

IMPLEMENTATIONS = ('auto', 'blocked', 'dense', 'pallas', 'splash')

# Instead of -inf, whose differences are NaN; scores are float32 whatever the inputs are.
MASKED = -1e30


def attend(kind: str, q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout | None = None,
           implementation: str = 'blocked', constrain: Any = unconstrained) -> jax.Array:
    """softmax(q k / sqrt(D)) v under a pattern, in work proportional to what the pattern allows.

    Args:
      kind: one of PATTERNS, or 'bidirectional': no mask.
      q, k, v: [B, H, L, D]. This order of axes is the fastest on CPUs, 1.4 times ahead of
        [B, L, H, D] forward and backward. Products are computed in their dtype; scores, softmax
        and sums are float32.
      layout: of the L states; not needed for 'causal' and 'bidirectional'.
      implementation: one of IMPLEMENTATIONS, of patterns with a layout: 'blocked', the fastest on
        CPUs; 'dense', the whole mask, to compare with; 'pallas' and 'splash', kernels for GPUs and
        TPUs, see kernels.py; 'auto', what is fastest here.
      constrain: Context.constrain, by which kernels are divided over a mesh.

    Returns:
      [B, H, L, D] in v's dtype, which remat policies know as 'attended'.

    Raises:
      ValueError: an unknown kind or implementation, or L is not the layout's.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'attention {implementation!r}; choose one of {IMPLEMENTATIONS}')
    length = q.shape[2]
    if kind not in (*PATTERNS, 'bidirectional'):
        raise ValueError(f'attention pattern {kind!r}; choose one of {PATTERNS}')
    if kind in ('bidirectional', 'causal'):
        every = np.ones((length, length), bool)
        out = _dense(q, k, v, np.tril(every) if kind == 'causal' else every)
        return checkpoint_name(out, 'attended')
    if layout is None or length != layout.length:
        raise ValueError(f'attention {kind!r} over {length} states with {layout}; the layout must '
                         'have as many')
    if implementation == 'auto':
        implementation = kernels.choose(kind, q.shape, q.dtype, layout, _blocked)
    if implementation in ('pallas', 'splash'):
        # They name what they compute themselves, inside of what is differentiated.
        kernel = functools.partial(getattr(kernels, implementation), kind, layout=layout)
        return constrain.divide(kernel, ('batch', 'heads', None, None))(q, k, v)
    out = (_dense(q, k, v, mask(kind, layout)) if implementation == 'dense'
           else _blocked(kind, q, k, v, layout))
    return checkpoint_name(out, 'attended')


def _blocked(kind, q, k, v, layout):
    """Dense blocks of the text and of every part of the image."""
    # Splits, because the gradient of a split is a concatenation: slices would be padded and added.
    parts = [lax.split(x, (layout.text, layout.image), axis=2) for x in (q, k, v)]
    (q_text, q_image), (k_text, k_image), (v_text, v_image) = parts
    text = _dense(q_text, k_text, v_text, np.tri(layout.text, dtype=bool))
    image = _image(kind, q_image, k_image, v_image, k_text, v_text, layout)
    return jnp.concatenate([text, image], axis=2)


def weights(kind: str, q: jax.Array, k: jax.Array, layout: Layout) -> jax.Array:
    """The attention weights themselves, float32 [B, H, L, L]; for looking at, not for training."""
    return _weights(q, k, mask(kind, layout))


def _weights(q, k, allowed):
    """softmax(q k / sqrt(D)) under a mask [L, L]."""
    scores = contract('bhqd,bhkd->bhqk', q, k, q.dtype) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(allowed[None, None], scores, MASKED))


def _dense(q, k, v, allowed):
    """Attention under a mask [L, L]."""
    return contract('bhqk,bhkd->bhqd', _weights(q, k, allowed), v, v.dtype).astype(v.dtype)


def _image(kind, q, k, v, k_text, v_text, layout):
    """Attention of the image states to the text and, block by block, to a window of the image.

    The states of a column follow each other in column-major order as those of a row do in raster
    order. So all patterns are alike: the queries of a block see some of the keys in the block and
    in the `reach` states before it. Text and window share one softmax without concatenation.
    """
    batch, heads, states, size = q.shape
    block, reach, allowed = _blocks(kind, layout)
    if kind == 'column':
        q, k, v = (transposed(x, layout.rows, layout.columns) for x in (q, k, v))
    by_block = (batch, heads, states // block, block)
    k, v = (_windows(x.reshape(*by_block, size), reach) for x in (k, v))

    dtype, scale = q.dtype, size ** -0.5
    text = scale * contract('bhqd,bhkd->bhqk', q, k_text, dtype)
    local = scale * contract('bhnqd,bhnkd->bhnqk', q.reshape(*by_block, size), k, dtype)
    local = jnp.where(allowed[None, None], local, MASKED)
    # Any shift leaves a softmax as it is, so no gradient passes through this one.
    top = lax.stop_gradient(jnp.maximum(text.max(-1), local.max(-1).reshape(q.shape[:3])))
    text = jnp.exp(text - top[..., None])
    local = jnp.exp(local - top.reshape(*by_block, 1))
    total = text.sum(-1) + local.sum(-1).reshape(q.shape[:3])
    out = contract('bhqk,bhkd->bhqd', text, v_text, dtype)
    out += contract('bhnqk,bhnkd->bhnqd', local, v, dtype).reshape(q.shape)
    out = (out / total[..., None]).astype(dtype)
    return transposed(out, layout.columns, layout.rows) if kind == 'column' else out


def _blocks(kind: str, layout: Layout) -> tuple[int, int, np.ndarray]:
    """How the image states, in a pattern's order, are cut for `_image`.

    Returns:
      block: queries of a block; whole rows (columns) of the grid. At least 16, and half the reach,
        so that windows overlap less than they cost; measured best within 10% on CPUs for grids
        of 10 x 10 and 32 x 32.
      reach: keys before the block.
      allowed: bool [n, block, reach + block].
    """
    line = layout.rows if kind == 'column' else layout.columns
    lines = layout.image // line
    furthest = window_reach(layout)  # of 'conv'
    reach = {'row': line, 'column': 0, 'conv': furthest + -furthest % line}[kind]
    wanted = max(16, reach // 2)
    block = next(line * n for n in range(1, lines + 1)
                 if lines % n == 0 and (line * n >= wanted or n == lines))
    reach = min(reach, layout.image - block)

    start = np.arange(0, layout.image, block)[:, None, None]
    query = start + np.arange(block)[:, None]
    key = start + np.arange(-reach, block)
    # Keys before the image stand where there is text or nothing, which is not for this part.
    allowed = visible(kind, layout, layout.text + query, layout.text + key) & (key >= 0)
    return block, reach, allowed


def _windows(blocks: jax.Array, reach: int) -> jax.Array:
    """[B, H, n, block, D] -> [B, H, n, reach + block, D]: each with what precedes it, or zeros."""
    n, block = blocks.shape[2:4]
    pieces = [blocks]
    for back in range(1, -(-reach // block) + 1):
        earlier = jnp.pad(blocks[:, :, :n - back], ((0, 0), (0, 0), (back, 0), (0, 0), (0, 0)))
        missing = min(block, reach - (back - 1) * block)
        pieces.insert(0, earlier[:, :, :, block - missing:])
    return jnp.concatenate(pieces, axis=3)
