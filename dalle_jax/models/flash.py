"""Block-sparse flash attention under the patterns of DALL-E, for NVIDIA GPUs.

Flash attention (Dao 2023) in the Triton dialect of Pallas. Scores never reach memory, and blocks of
queries and keys of which no pair is allowed are never visited. One program computes one block of
queries of one head (in the gradient of keys and values: one block of keys) and walks through the
list of blocks on the other side that it needs, first those of which every pair is allowed. Masks
are computed from positions.

Kernels see the states in an order of their own: those of a column layer's image come column by
column, so that a column's states follow each other as those of a row do (Ramesh et al. 2021, app.
B.1; see patterns.py), and lengths are filled up to whole blocks.

B batch, H heads, D head size, L states. Pallas is imported where it is used: CPUs do without.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dalle_jax.models.patterns import transposed, visible

SIZES = (32, 64, 128)  # of heads
_MASKED = -1e30  # instead of -inf, whose differences are NaN
_LOG2_E = 1.4426950408889634  # GPUs have an exp2; exp(x) = exp2(x log2(e))


def ordered(kind, layout, x, multiple):
    """[B, H, L, D] in the kernels' order, filled up with zeros to a multiple of states.

    No state of a pattern sees a later one, and filled-up queries have zero cotangents: they leave
    no trace.
    """
    if kind == 'column':
        x = _transposed_image(x, layout.text, layout.rows, layout.columns)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, 0)))


def restored(kind, layout, x, length):
    """The inverse of `ordered`."""
    x = x[:, :, :length]
    if kind == 'column':
        x = _transposed_image(x, layout.text, layout.columns, layout.rows)
    return x


def _transposed_image(x, text, rows, columns):
    words, image = lax.split(x, (text, x.shape[2] - text), axis=2)
    return jnp.concatenate([words, transposed(image, rows, columns)], axis=2)


class Tile(NamedTuple):
    """Shape of a kernel's blocks, and how Triton runs it: warps a program, depth of pipelining."""

    own: int
    other: int
    warps: int
    stages: int


class _Call(NamedTuple):
    """What is static in a call: the key under which kernels are compiled."""

    kind: str
    layout: Any
    tiles: tuple[Tile, Tile, Tile]  # forward, gradient of q, gradients of k and v
    interpret: bool


def default_tiles(size: int, dtype: Any) -> tuple[Tile, Tile, Tile]:
    """Blocks of the three kernels.

    In 16 bits the largest that compile for a Hopper GPU without spilling registers and keep it
    busy with several programs; smaller ones in the gradients, where they skip more. Not chosen by
    time.
    """
    if jnp.dtype(dtype).itemsize == 4:
        # In full precision, without tensor cores: larger blocks take minutes to compile.
        return (Tile(32, 32, 4, 1),) * 3
    return Tile(128, 64, 8, 2 if size == 128 else 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)


def pallas(kind: str, q: jax.Array, k: jax.Array, v: jax.Array, layout: Any = None,
           tiles: tuple[Tile, Tile, Tile] | None = None, interpret: bool = False) -> jax.Array:
    """Block-sparse flash attention on an NVIDIA GPU, with gradients.

    Products are computed in the arrays' dtype (float32 in full precision) and added up in float32.

    Args:
      kind: 'row', 'column', 'conv' or 'causal'.
      q, k, v: [B, H, L, D] of one dtype, float32, bfloat16 or float16; D in SIZES.
      layout: patterns.Layout of the L states; not needed for 'causal'.
      tiles: of the three kernels, sizes powers of two from 16; None: `default_tiles`.
      interpret: run the kernels as ordinary operations, on any backend.

    Returns:
      [B, H, L, D].

    Raises:
      ValueError: a head size or dtype without a kernel.
    """
    batch, heads, length, size = q.shape
    if size not in SIZES:
        raise ValueError(f"attention 'pallas' with heads of {size}; its kernels are for "
                         f"{SIZES}: change the number of heads or choose 'blocked'")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention 'pallas' of {q.dtype}, {k.dtype} and {v.dtype}; choose one of "
                         "float32, bfloat16, float16 for all, or 'blocked'")
    tiles = tiles or default_tiles(size, q.dtype)
    call = _Call(kind, layout, tiles, interpret)
    multiple = max(max(tile.own, tile.other) for tile in tiles)
    q, k, v = (ordered(kind, layout, x, multiple).reshape(batch * heads, -1, size)
               for x in (q, k, v))
    out = _flash(call, q, k, v).reshape(batch, heads, -1, size)
    return restored(kind, layout, out, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(call, q, k, v):
    """Attention in the kernels' order over whole blocks, [B H, L, D]."""
    return _forward(call, q, k, v)[0]


def _forward(call, q, k, v):
    """Output [B H, L, D], and log2 of each query's sum of exponentials, float32 [B H, L]."""
    sums = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    out, lse = _run(_forward_kernel, call, call.tiles[0], False, own=(q,), other=(k, v),
                    returns=(q, sums))
    # Under jax.checkpoint, a policy that saves these names saves this kernel's second run.
    return checkpoint_name(out, 'attended'), checkpoint_name(lse, 'attended')


def _flash_forward(call, q, k, v):
    out, lse = _forward(call, q, k, v)
    return out, (q, k, v, out, lse)


def _flash_backward(call, residuals, cotangent):
    q, k, v, out, lse = residuals
    delta = (out.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(-1)
    dq, = _run(_query_gradient_kernel, call, call.tiles[1], False,
               own=(q, cotangent, lse, delta), other=(k, v), returns=(q,))
    dk, dv = _run(_key_gradient_kernel, call, call.tiles[2], True,
                  own=(k, v), other=(q, cotangent, lse, delta), returns=(k, v))
    return dq, dk, dv


_flash.defvjp(_flash_forward, _flash_backward)


def _run(kernel, call, tile, by_key, own, other, returns):
    """One program for each block of each head.

    Args:
      kernel: gets the lists of blocks, arrays of `own` and of `other`, and outputs, and by keyword
        'call' and 'tile'.
      by_key: whether programs are for blocks of keys instead of queries.
      own: arrays of which a program sees its own block.
      other: arrays of which a program sees all of its head.
      returns: arrays or ShapeDtypeStructs like the outputs, of which a program writes its block.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def blocked(x):
        return pl.BlockSpec((None, tile.own, *x.shape[2:]),
                            lambda i, head: (head, i, *(0 for _ in x.shape[2:])))

    def whole(x):
        return pl.BlockSpec((None, *x.shape[1:]),
                            lambda i, head: (head, *(0 for _ in x.shape[1:])))

    batch, length = own[0].shape[:2]
    order, bounds = blocks(call.kind, call.layout, length, tile.own, tile.other, by_key)
    return pl.pallas_call(
        functools.partial(kernel, call=call, tile=tile), grid=(length // tile.own, batch),
        in_specs=[pl.BlockSpec(), pl.BlockSpec(), *map(blocked, own), *map(whole, other)],
        out_specs=[blocked(x) for x in returns],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in returns],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=call.interpret, name=f'attention{kernel.__name__}',
    )(order, bounds, *own, *other)


@functools.cache
def blocks(kind: str, layout: Any, length: int, own: int, other: int, by_key: bool
           ) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks on the other side each block needs.

    Args:
      kind, layout: see `visible`.
      length: a multiple of `own` and `other`.
      own, other: states of a block on either side; own blocks are queries, or keys if `by_key`.

    Returns:
      order: int32, the lists of all blocks one after the other. In a list, blocks in which every
        pair is allowed come first.
      bounds: int32 [length / own, 3], where in `order` a block's list starts, where blocks start of
        which only some pairs are allowed, and where it ends.
    """
    state = np.arange(length)
    pairs = visible(kind, layout, state[:, None], state[None, :])
    pairs = (pairs.T if by_key else pairs).reshape(length // own, own, length // other, other)
    full, some = pairs.all((1, 3)), pairs.any((1, 3))
    lists = [np.flatnonzero(part) for row in zip(full, some & ~full) for part in row]
    ends = np.cumsum([0, *map(len, lists)])
    return (np.concatenate(lists).astype(np.int32),
            np.stack([ends[:-1:2], ends[1::2], ends[2::2]], axis=1).astype(np.int32))


def _walk(order, bounds, call, tile, by_key, step, carry):
    """carry = step(carry, slice, hide) over the blocks that this program needs.

    step: gets where a block lies, and a function of scores [own, other] that hides what must not
    be seen.
    """
    from jax.experimental import pallas as pl

    own = pl.program_id(0)

    def body(some, n, carry):
        block = order[n]

        def hide(scores):
            if not some:
                return scores
            mine = (own * tile.own + jnp.arange(tile.own))[:, None]
            others = (block * tile.other + jnp.arange(tile.other))[None, :]
            query, key = (others, mine) if by_key else (mine, others)
            return jnp.where(visible(call.kind, call.layout, query, key), scores, _MASKED)

        return step(carry, pl.ds(block * tile.other, tile.other), hide)

    start, middle, end = (bounds[own, i] for i in range(3))
    carry = lax.fori_loop(start, middle, functools.partial(body, False), carry)
    return lax.fori_loop(middle, end, functools.partial(body, True), carry)


def _product(a, b):
    return lax.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _forward_kernel(order, bounds, q_ref, k_ref, v_ref, out_ref, lse_ref, *, call, tile):
    q = q_ref[...]
    scale = _LOG2_E * q.shape[-1] ** -0.5

    def step(carry, at, hide):
        out, top, total = carry
        scores = hide(scale * _product(q, k_ref[at, :].T))
        higher = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - higher[:, None])
        fade = jnp.exp2(top - higher)
        out = fade[:, None] * out + _product(weights.astype(q.dtype), v_ref[at, :])
        return out, higher, fade * total + weights.sum(1)

    out, top, total = _walk(order, bounds, call, tile, False, step, (
        jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[0], _MASKED), jnp.zeros(q.shape[0])))
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)


def _query_gradient_kernel(order, bounds, q_ref, cotangent_ref, lse_ref, delta_ref, k_ref, v_ref,
                           dq_ref, *, call, tile):
    q, cotangent, lse, delta = q_ref[...], cotangent_ref[...], lse_ref[...], delta_ref[...]
    scale = q.shape[-1] ** -0.5

    def step(dq, at, hide):
        k = k_ref[at, :]
        weights = jnp.exp2(hide(_LOG2_E * scale * _product(q, k.T)) - lse[:, None])
        slope = weights * (_product(cotangent, v_ref[at, :].T) - delta[:, None])
        return dq + _product(slope.astype(q.dtype), k)

    dq = _walk(order, bounds, call, tile, False, step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (scale * dq).astype(dq_ref.dtype)


def _key_gradient_kernel(order, bounds, k_ref, v_ref, q_ref, cotangent_ref, lse_ref, delta_ref,
                         dk_ref, dv_ref, *, call, tile):
    """Scores are [keys, queries] here, so that no product but those with inputs is transposed."""
    k, v = k_ref[...], v_ref[...]
    scale = k.shape[-1] ** -0.5

    def step(carry, at, hide):
        dk, dv = carry
        q, cotangent = q_ref[at, :], cotangent_ref[at, :]
        weights = jnp.exp2(hide(_LOG2_E * scale * _product(k, q.T)) - lse_ref[at][None, :])
        slope = weights * (_product(v, cotangent.T) - delta_ref[at][None, :])
        return (dk + _product(slope.astype(k.dtype), q),
                dv + _product(weights.astype(k.dtype), cotangent))

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _walk(order, bounds, call, tile, True, step, (zeros, zeros))
    dk_ref[...] = (scale * dk).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
