"""The compiled programs behind generate.Model, and how many images fit into one of them.

C captions, N candidates of a caption.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dalle_jax import machine, runs

# Images drawn at once where the memory allows it; on a CPU more are no faster.
MOST_AT_ONCE = {'cpu': 64, 'gpu': 512, 'tpu': 512}
MEMORY_SHARE = 0.8  # of the free memory: what is counted are the large arrays
# Of images decoded at once: enough to keep an accelerator busy. In a loop over parts, CPUs would
# run convolutions on one core.
PIXELS_AT_ONCE = {'cpu': 2**40, 'gpu': 2**19, 'tpu': 2**19}
ROWS_AT_ONCE = 64  # of scored images, and of captions


def batch_shape(batch: int, captions: int, candidates: int) -> tuple[int, int]:
    """(captions, candidates) of a batch of at most `batch` images, all batches filled alike."""
    if candidates > batch:
        return 1, -(-candidates // -(-candidates // batch))
    batches = -(-captions // (batch // candidates))
    return -(-captions // batches), candidates


def images_at_once(run: runs.Run, image_run: runs.Run, captions: int, candidates: int, dtype: Any,
                   guided: bool) -> int:
    """The largest power of two of images whose drawing fits into the free memory.

    It says so where the candidates of a caption have to be drawn in parts.
    """
    most = MOST_AT_ONCE[jax.default_backend()]
    free = MEMORY_SHARE * machine.memory()
    # Drawing lays the weights out anew for its products.
    weights = sum(x.size for x in jax.tree.leaves(run.params)) * dtype.itemsize

    def needed(batch):
        rows, width = batch_shape(batch, captions, candidates)
        return (weights + decoding_bytes(image_run, rows * width)
                + run.module.sample_bytes(run.config, rows, width, dtype, guided))

    batch = most
    while batch > 1 and needed(batch) > free:
        batch //= 2
    if candidates > batch:
        width = batch_shape(batch, captions, candidates)[1]
        why = f'more than {most} at once are no faster'
        if batch < most:
            why = (f'memory: all at once take {needed(candidates) / 2**30:.1f} GiB, and '
                   f'{free / 2**30:.1f} can be used')
        runs.say(f'{candidates} candidates of a caption in {-(-candidates // width)} batches of '
                 f'{width}: {why}')
    return batch


def to_uint8(images: jax.Array) -> jax.Array:
    """Float images in [0, 1] as uint8, rounded."""
    return jnp.round(images * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=(
    'dalle', 'config', 'tokenizer', 'tokenizer_config', 'dtype', 'top_k', 'nucleus', 'guided',
    'keep'))
def draw(params, tokenizer_params, text, keys, *, image, temperature, top_p, guidance, dalle,
         config, tokenizer, tokenizer_config, dtype, top_k, nucleus, guided, keep):
    """Prefill, the image tokens and the decoder in one program."""
    if image is not None:
        image = jnp.broadcast_to(image, (len(text), *image.shape))
    ids, logp = dalle.generate(
        params, config, text, keys=keys, temperature=temperature, top_k=top_k,
        top_p=top_p if nucleus else 1.0, guidance=guidance if guided else 1.0, image=image,
        keep=keep, dtype=dtype)
    flat = ids.reshape(-1, *ids.shape[2:])
    size = decoded_at_once(tokenizer_config, len(flat))
    padded = jnp.pad(flat, ((0, -len(flat) % size), (0, 0), (0, 0)))
    images = lax.map(lambda part: to_uint8(tokenizer.decode(tokenizer_params, tokenizer_config,
                                                            part)),
                     padded.reshape(-1, size, *flat.shape[1:]))
    images = images.reshape(-1, *images.shape[2:])[:len(flat)]
    return (images.reshape(*ids.shape[:2], *images.shape[1:]), ids, logp,
            dalle.text_likelihood(params, config, text, dtype))


def decoded_at_once(config: Any, images: int) -> int:
    """How many of the images the decoder gets in one piece."""
    return max(1, min(images, PIXELS_AT_ONCE[jax.default_backend()] // config.image_size ** 2))


def decoding_bytes(run: runs.Run, images: int) -> int:
    """Estimated memory of decoding: four of the decoder's largest activations."""
    ids = jnp.zeros((decoded_at_once(run.config, images), *run.config.grid), jnp.int32)
    program = jax.make_jaxpr(lambda params, ids: run.module.decode(params, run.config, ids))
    return 4 * max(x.aval.size * x.aval.dtype.itemsize
                   for equation in program(run.params, ids).eqns for x in equation.outvars)


def in_batches(function: Callable, *arrays: np.ndarray) -> np.ndarray:
    """function(*arrays) on rows [B, ...] in equal parts, the last one padded."""
    count = len(arrays[0])
    size = -(-count // -(-count // ROWS_AT_ONCE))
    rows = [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
    return np.concatenate(jax.device_get(
        [function(*(array[part] for array in arrays)) for part in rows]))[:count]


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(module, config, params, images):
    return module.encode(params, config, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode(module, config, params, ids):
    return to_uint8(module.decode(params, config, ids))


@functools.partial(jax.jit, static_argnums=(0, 1))
def embed_text(module, config, params, text):
    return module.embed_text(params, config, text)


@functools.partial(jax.jit, static_argnums=(0, 1))
def embed_image(module, config, params, images):
    return module.embed_image(params, config, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def likelihood(module, config, params, ids, text):
    return module.likelihood(params, config, text, ids)[1]
