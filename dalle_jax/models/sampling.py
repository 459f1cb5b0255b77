"""Drawing images from DALL-E, token by token, in one program.

C captions, N candidates of a caption, T text and I = R x C image states, V image tokens, d width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dalle_jax.models import decoding, losses
from dalle_jax.models.context import unconstrained
from dalle_jax.models.dalle_network import Config, embed_image, embed_text, logits
from dalle_jax.models.layers import tiled


def filter_logits(logits: jax.Array, temperature: jax.Array | float, top_k: int,
                  top_p: jax.Array | float) -> jax.Array:
    """Logits [..., V] with -inf where a token may not be drawn.

    top_k keeps the k most probable tokens (0: all). top_p then keeps the smallest set of the most
    probable of them whose probability, at this temperature and among them, reaches top_p; so one
    at least. Tokens tied with the last one kept are kept. A Python number top_p >= 1 and top_k 0
    compile to nothing.
    """
    if top_k and top_k < logits.shape[-1]:
        last = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < last, -jnp.inf, logits)
    if not isinstance(top_p, (int, float)) or top_p < 1:
        # The limit of temperature 0 puts all probability on the best token.
        p = jax.nn.softmax(logits / jnp.maximum(temperature, 1e-6))
        descending = -jnp.sort(-p, axis=-1)
        before = jnp.cumsum(descending, axis=-1) - descending
        last = jnp.min(jnp.where(before < top_p, descending, 1.0), axis=-1, keepdims=True)
        # At 1 nothing is dropped, not even what is lost in the rounding of the sum.
        logits = jnp.where((p < last) & (top_p < 1), -jnp.inf, logits)
    return logits


def matrices_in(params: Any, dtype: Any) -> Any:
    """The matrices of the blocks and heads in the dtype of their products; the rest as it is.

    Drawing a token reads all of them and does little else: in bfloat16 it takes half the time.
    """
    def one(path, x):
        names = {getattr(entry, 'key', None) for entry in path}
        return x.astype(dtype) if names & {'kernel', 'heads'} else x

    return jax.tree_util.tree_map_with_path(one, params)


def cast_matrices(params: Any, dtype: Any) -> None:
    """`matrices_in`, in place and one after the other, so that both never exist as a whole."""
    for name, x in params.items():
        if isinstance(x, dict) and name != 'heads':
            cast_matrices(x, dtype)
        else:
            params[name] = matrices_in({name: x}, dtype)[name]


def generate(params: Any, config: Config, text: jax.Array, *, keys: jax.Array,
             temperature: jax.Array | float = 1.0, top_k: int = 0, top_p: jax.Array | float = 1.0,
             guidance: jax.Array | float = 1.0, image: jax.Array | None = None,
             keep: tuple[int, int] = (0, 0), dtype: Any = jnp.float32,
             constrain: Any = unconstrained) -> tuple[jax.Array, jax.Array]:
    """Draws N images for each of C captions, token by token; to be called under jit.

    The caption is read once and its keys and values are shared by its candidates. Token i of an
    image uses fold_in(its key, i), so that an image depends on its caption and key only, up to the
    rounding of other batch shapes.

    Args:
      text: int32 [C, T - 1].
      keys: typed PRNG keys [C, N], of an implementation whose numbers do not depend on the batch,
        such as threefry2x32 ('rbg' ones do).
      temperature: divides the logits; 0 takes the most probable token. May be traced.
      top_k, top_p: see filter_logits; off by default. top_k is static, top_p may be traced.
      guidance: s of classifier-free guidance (Ho and Salimans 2022), applied before the others:
        logits = u + s (c - u), with c those of the caption and u those of the empty one, which
        needs training with config.caption_dropout. Both run in one batch, with twice the caches.
        1: off; the Python number 1 compiles to nothing. May be traced.
      image: int32 [C, R, C], tokens of an image prompt, or None.
      keep: how many top rows and left columns of the prompt are kept; the rest, a rectangle that
        reaches the bottom right corner, is drawn (Ramesh et al. 2021, sec. 3.3). Static.
      dtype: of the matrix products and caches.
      constrain: Context.constrain, of a mesh whose replica x fsdp divides C.

    Returns:
      int32 tokens [C, N, R, C], and the log-likelihood of all of them (also of kept ones) given
      the caption, at temperature 1 and without filters and guidance, float32 [C, N], in nats.

    Raises:
      ValueError: on keys, a top_k or a prompt that do not fit.
    """
    captions, candidates = keys.shape
    kept = _kept(config, keys, top_k, image, keep)
    given = jnp.zeros((captions, config.image_length), jnp.int32)
    if image is not None:
        given = image.reshape(captions, -1).astype(jnp.int32)
    first = int(np.argmin(kept))  # what is kept before it is read at once
    guided = not (isinstance(guidance, (int, float)) and guidance == 1)

    branches = 2 if guided else 1  # each caption and, behind it on the same device, an empty one

    def doubled(x):
        return jnp.repeat(x, branches, axis=0)

    def branch(x, which):
        return x.reshape(captions, branches, *x.shape[1:])[:, which]

    params = matrices_in(params, dtype)
    # Whole tables and head: a lookup in divided ones would gather the states instead.
    params |= jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), {
        'text': params['text'], 'image': params['image'],
        'heads': {'image': params['heads']['image']}})
    stack, blocks, p = params['transformer'], config.blocks, params['image']
    text, keys = constrain(text, ('batch', None)), constrain(keys, ('batch', None))
    x = embed_text(params, jnp.stack([text, 0 * text][:branches], axis=1).reshape(
        -1, text.shape[1]))
    logp = jnp.zeros((captions, candidates))
    if first:
        x = jnp.concatenate([x, doubled(embed_image(params, given[:, :-1]))], axis=1)
        x, prompt, caches = decoding.prefill_image(stack, blocks, x, first, candidates, dtype=dtype,
                                                   constrain=constrain)
        nats = losses.vocabulary_cross_entropy(
            branch(x, 0)[:, config.text_length:][:, :first], params['heads']['image'],
            given[:, :first], dtype)
        logp -= nats.sum(axis=1)[:, None]
    else:
        caches = decoding.empty_caches(blocks, len(x), candidates, dtype)
        _, prompt = decoding.prefill(stack, blocks, x, dtype=dtype, constrain=constrain)
    if jax.default_backend() == 'cpu' and constrain is unconstrained:
        rows = len(x) * candidates
        stack = decoding.tiled_stack(stack, rows)
        params = {'heads': {'image': tiled(params['heads']['image'], rows)}}

    def chosen(position, scores, keys):
        # The largest of logits / t + noise is a sample; times t, the limit t = 0 is no exception.
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(
            jax.random.fold_in(key, position), (config.image_vocab,))))(keys)
        noisy = filter_logits(scores, temperature, top_k, top_p) + temperature * noise
        return lax.top_k(noisy, 1)[1][..., 0]  # argmax, which CPUs do not vectorise

    def draw(carry, scanned):
        caches, previous, logp = carry
        position, given, kept = scanned
        row, column = position // config.grid[1], position % config.grid[1]
        x = jnp.where(position == 0, p['start'][None, None], p['tokens'][previous])
        x = doubled(x + (p['rows'][row] + p['columns'][column])[None, None])
        x, caches = decoding.step(stack, blocks, x, position, prompt, caches, dtype=dtype,
                                  constrain=constrain)
        scores = logits(params, x, 'image', dtype)
        plain = branch(scores, 0)
        if guided:
            empty = branch(scores, 1)
        scores = empty + guidance * (plain - empty) if guided else plain
        token = constrain.divide(functools.partial(chosen, position), ('batch',))(scores, keys)
        token = jnp.where(kept, given[:, None], token)
        return (caches, token, logp - losses.cross_entropy(plain, token)), token

    before = given[:, max(first - 1, 0), None]
    start = caches, jnp.broadcast_to(before, (captions, candidates)), logp
    (_, _, logp), drawn = lax.scan(draw, start, (
        jnp.arange(first, config.image_length), given.T[first:], jnp.asarray(kept[first:])))
    ids = jnp.concatenate([
        jnp.broadcast_to(given[:, None, :first], (captions, candidates, first)),
        jnp.moveaxis(drawn, 0, -1)], axis=-1)
    return ids.reshape(captions, candidates, *config.grid), logp


def _kept(config, keys, top_k, image, keep):
    """Which image tokens are given, bool [I]; checks what `generate` is called with."""
    captions, grid = keys.shape[0], tuple(config.grid)
    if 'rbg' in str(jax.random.key_impl(keys)):
        raise ValueError('dalle: numbers of rbg keys depend on the batch; give threefry2x32 keys')
    if not 0 <= top_k <= config.image_vocab:
        raise ValueError(f'dalle: top_k={top_k}; there are {config.image_vocab} image tokens, give '
                         '0 (off) up to as many')
    if image is None and any(keep):
        raise ValueError(f'dalle: keep={keep} without an image to keep tokens of')
    if image is not None and image.shape != (captions, *grid):
        raise ValueError(f'dalle: tokens {list(image.shape)} of an image prompt; expected '
                         f'{[captions, *grid]}, the captions and the grid')
    rows, columns = keep
    if not (0 <= rows < grid[0] and 0 <= columns < grid[1]):
        raise ValueError(f'dalle: keep={keep} rows and columns of a grid of {grid}: fewer must be '
                         'kept, so that something is left to draw')
    kept = np.zeros(grid, bool)
    kept[:rows], kept[:, :columns] = True, True
    return kept.reshape(-1)


def sample_bytes(config: Config, captions: int, candidates: int, dtype: Any = jnp.float32,
                 guided: bool = False) -> int:
    """Bytes of the keys and values that `generate` holds: of the images, and of the text."""
    captions *= 2 if guided else 1
    caches = jax.eval_shape(
        lambda: decoding.empty_caches(config.blocks, captions, candidates, dtype))
    text = 2 * captions * config.depth * config.width * config.text_length
    return (sum(x.size for x in jax.tree.leaves(caches)) + text) * jnp.dtype(dtype).itemsize
