"""The compiled programs behind generate.Model, and how many images fit into one of them.

C captions, N candidates of a caption.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dalle_jax import machine, runs
from dalle_jax.training import partition

# Images that a device draws at once where the memory allows it; on a CPU more are no faster.
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


def batch_ways(mesh: Mesh) -> int:
    """How many parts a mesh divides a batch into."""
    return math.prod(mesh.shape[axis] for axis in partition.DATA)


def division(captions: int, candidates: int, ways: int) -> tuple[int, int, int]:
    """(captions, pieces, candidates of a piece) of a batch that `ways` can divide.

    The candidates of each caption are cut into pieces, each of which is drawn by one device, and
    captions times pieces is a multiple of `ways`. Of the divisions that draw least beyond what was
    asked for, the one with fewest pieces: each reads the caption for itself.
    """
    found = []
    for pieces in range(1, ways + 1):
        unit = ways // math.gcd(ways, pieces)
        found.append((-(-captions // unit) * unit, pieces, -(-candidates // pieces)))
    return min(found, key=math.prod)


def images_at_once(run: runs.Loaded, image_run: runs.Loaded, captions: int, candidates: int,
                   dtype: Any, guided: bool, mesh: Mesh) -> int:
    """The largest power of two of images whose drawing fits into the free memory, on each device
    or group of devices that the mesh gives a part of a batch.

    It says so where the candidates of a caption have to be drawn in parts.
    """
    ways = batch_ways(mesh)
    most = ways * MOST_AT_ONCE[jax.default_backend()]
    # The devices of a CPU share its memory.
    share = mesh.size if jax.default_backend() == 'cpu' else 1
    free = MEMORY_SHARE * machine.memory() / share
    # Drawing lays the weights out anew for its products.
    weights = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(run.params))

    def needed(batch):
        rows, pieces, width = division(*batch_shape(batch, captions, candidates), ways)
        rows = rows * pieces // ways  # of a device
        caches = run.module.sample_bytes(run.config, rows, width, dtype, guided)
        return (weights * dtype.itemsize + decoding_bytes(image_run, rows * width)
                + caches // mesh.shape['tensor'])

    batch = most
    while batch > ways and needed(batch) > free:
        batch //= 2
    if candidates > batch:
        width = batch_shape(batch, captions, candidates)[1]
        why = f'more than {most} at once are no faster'
        if batch < most:
            why = (f'memory: all at once take {needed(candidates) / 2**30:.1f} GiB of a '
                   f'device, and {free / 2**30:.1f} can be used')
        runs.say(f'{candidates} candidates of a caption in {-(-candidates // width)} batches of '
                 f'{width}: {why}')
    return batch


def to_uint8(images: jax.Array) -> jax.Array:
    """Float images in [0, 1] as uint8, rounded."""
    return jnp.round(images * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=(
    'dalle', 'config', 'tokenizer', 'tokenizer_config', 'dtype', 'top_k', 'nucleus', 'guided',
    'keep', 'constrain'))
def draw(params, tokenizer_params, text, keys, *, image, temperature, top_p, guidance, dalle,
         config, tokenizer, tokenizer_config, dtype, top_k, nucleus, guided, keep, constrain):
    """Prefill, the image tokens and the decoder in one program."""
    if image is not None:
        image = jnp.broadcast_to(image, (len(text), *image.shape))
    ids, logp = dalle.generate(
        params, config, text, keys=keys, temperature=temperature, top_k=top_k,
        top_p=top_p if nucleus else 1.0, guidance=guidance if guided else 1.0, image=image,
        keep=keep, dtype=dtype, constrain=constrain)

    def decoded(params, flat):
        size = decoded_at_once(tokenizer_config, len(flat))
        padded = jnp.pad(flat, ((0, -len(flat) % size), (0, 0), (0, 0)))
        images = lax.map(lambda part: to_uint8(tokenizer.decode(params, tokenizer_config, part)),
                         padded.reshape(-1, size, *flat.shape[1:]))
        return images.reshape(-1, *images.shape[2:])[:len(flat)]

    images = constrain.divide(decoded, ('batch',), tokenizer_params)(
        ids.reshape(-1, *ids.shape[2:]))
    return (images.reshape(*ids.shape[:2], *images.shape[1:]), ids, logp,
            dalle.text_likelihood(params, config, text, dtype, constrain))


def decoded_at_once(config: Any, images: int) -> int:
    """How many of the images the decoder gets in one piece."""
    return max(1, min(images, PIXELS_AT_ONCE[jax.default_backend()] // config.image_size ** 2))


def decoding_bytes(run: runs.Run, images: int) -> int:
    """Estimated memory of decoding: four of the decoder's largest activations."""
    ids = jnp.zeros((decoded_at_once(run.config, images), *run.config.grid), jnp.int32)
    program = jax.make_jaxpr(lambda params, ids: run.module.decode(params, run.config, ids))
    return 4 * max(x.aval.size * x.aval.dtype.itemsize
                   for equation in program(run.params, ids).eqns for x in equation.outvars)


def in_batches(function: Callable, ways: int, *arrays: np.ndarray, at_once: int = ROWS_AT_ONCE
               ) -> np.ndarray:
    """function(*arrays) on rows [B, ...] in equal batches that `ways` divides, the last padded.

    Each of the ways gets at most `at_once` rows.
    """
    count = len(arrays[0])
    size = -(-count // -(-count // (ways * at_once)))
    size += -size % ways
    rows = [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
    return np.concatenate(jax.device_get(
        [function(*(array[part] for array in arrays)) for part in rows]))[:count]


def _of_rows(function):
    """Jits function(module, config, params, rows [B, ...]), of which each device gets its rows."""
    def run(module, config, constrain, params, rows):
        one = functools.partial(function, module, config)
        return constrain.divide(one, ('batch',), params)(rows)
    return jax.jit(run, static_argnums=(0, 1, 2))


@_of_rows
def encode(module, config, params, images):
    return module.encode(params, config, images)


@_of_rows
def decode(module, config, params, ids):
    return to_uint8(module.decode(params, config, ids))


@_of_rows
def embed_text(module, config, params, text):
    return module.embed_text(params, config, text)


@_of_rows
def embed_image(module, config, params, images):
    return module.embed_image(params, config, images)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def likelihood(module, config, constrain, dtype, params, ids, text):
    """ln p(text) and ln p(image | text), float32 [B, 2]."""
    return jnp.stack(module.likelihood(params, config, text, ids, dtype, constrain), axis=1)
