"""Attention kernels for accelerators, and the choice among them.

All compute the function of attention.attend, patterns and all: softmax(q k / sqrt(D)) v where an
image state sees the text and some of the image.

    pallas    flash.py, for NVIDIA GPUs
    splash    the splash attention that comes with JAX, for TPUs
    choose    which implementation 'auto' means

JAX does not divide a kernel over devices: on a mesh, call it inside jax.shard_map over batch and
heads (with check_vma=False; kernels do not declare along which axes their results vary).

B batch, H heads, D head size, L states. Nothing here imports Pallas before it is used.
"""

import functools
import logging
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models.flash import ordered, pallas, restored
from dalle_jax.models.patterns import visible

SPLASH_BLOCK = 128  # states of a block, the fewest there can be: larger ones skip less

# Largest difference to the blocked computation, relative to the largest entry: of two roundings,
# and in float32 of products that accelerators round to fewer bits by default.
TOLERANCE = {'float32': 1e-2, 'float16': 1e-2, 'bfloat16': 5e-2}


def splash(kind: str, q: jax.Array, k: jax.Array, v: jax.Array, layout: Any = None,
           interpret: bool = False) -> jax.Array:
    """JAX's block-sparse flash attention on a TPU, with gradients.

    Args:
      kind: 'row', 'column', 'conv' or 'causal'.
      q, k, v: [B, H, L, D].
      layout: patterns.Layout of the L states; not needed for 'causal'.
      interpret: run the kernels as ordinary operations, on any backend.

    Returns:
      [B, H, L, D] in q's dtype.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    heads, length, size = q.shape[1:]
    q = (q.astype(jnp.float32) * size ** -0.5).astype(q.dtype)
    q, k, v = (ordered(kind, layout, x, SPLASH_BLOCK) for x in (q, k, v))
    state = np.arange(q.shape[2])
    mask = splash_attention.NumpyMask(visible(kind, layout, state[:, None], state[None, :]))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads), residual_checkpoint_name='attended',
        interpret=interpret)
    return restored(kind, layout, jax.vmap(kernel)(q, k, v), length)


def choose(kind: str, shape: tuple[int, ...], dtype: Any, layout: Any, blocked: Callable) -> str:
    """What 'auto' means: 'blocked', or a kernel that is right on this device and faster there.

    On a GPU or TPU this compiles and runs both on a small batch, forward and backward, once in a
    process; on a CPU nothing. It may be called while something else is traced. Processes that work
    together must all come to the same answer, so there a kernel that is right is taken untimed.

    Args:
      kind: 'row', 'column', 'conv' or 'causal'.
      shape: [B, H, L, D] of q, k and v.
      dtype: of q, k and v.
      layout: patterns.Layout of the L states.
      blocked: (kind, q, k, v, layout) -> output, to which a kernel must be equal.
    """
    kernel = {'gpu': pallas, 'tpu': splash}.get(jax.default_backend())
    # GPUs are fast in float32 by rounding products, which `pallas` does not.
    if kernel is None or kernel is pallas and jnp.dtype(dtype) == jnp.float32:
        return 'blocked'
    heads, length, size = shape[1:]
    small = (2, min(heads, 8), length, size)
    better = _better(kind, small, jnp.dtype(dtype), layout, kernel, blocked,
                     timed=jax.process_count() == 1)
    return kernel.__name__ if better else 'blocked'


@functools.cache
def _better(kind, shape, dtype, layout, kernel, blocked, timed):
    """Whether `kernel` equals `blocked` and, where it is timed, is faster. Logs why."""
    # What is traced at present, meshes and named axes belong to a thread; a new one has none.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_compare, kind, shape, dtype, layout, kernel, blocked, timed).result()


def _compare(kind, shape, dtype, layout, kernel, blocked, timed):
    label = f'attention {kind!r} {shape} {dtype} by {kernel.__name__!r}'
    draw = np.random.default_rng(0)
    arrays = jax.device_put([draw.normal(size=shape).astype(dtype) for _ in range(4)],
                            jax.local_devices()[0])

    def compiled(attend):
        def run(q, k, v, cotangent):
            out, vjp = jax.vjp(lambda *x: attend(kind, *x, layout), q, k, v)
            return out, *vjp(cotangent)
        return jax.jit(run).lower(*arrays).compile()

    reference = compiled(blocked)
    expected = [np.asarray(x, np.float64) for x in reference(*arrays)]
    try:
        candidate = compiled(kernel)
        got = [np.asarray(x, np.float64) for x in candidate(*arrays)]
    except Exception as error:  # whatever a compiler or a driver may raise
        logging.warning("%s does not run, 'blocked' is used: %s: %s", label,
                        type(error).__name__, str(error)[:1000])
        return False
    worst = np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in zip(got, expected)])
    if not worst <= TOLERANCE[dtype.name]:  # nor may it be NaN
        logging.warning("%s differs by %.2g, 'blocked' is used", label, worst)
        return False
    if not timed:
        logging.info('%s is right, and used', label)
        return True
    ratio = _seconds(candidate, arrays) / _seconds(reference, arrays)
    logging.info("%s takes %.2f times as long as by 'blocked'; the faster is used", label, ratio)
    return ratio < 1


def _seconds(run, arrays, repeats=7, calls=5):
    """Median time of a call, several of them queued at a time to hide their dispatch."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run(*arrays) for _ in range(calls)])
        times.append(time.perf_counter() - start)
    return statistics.median(times) / calls
