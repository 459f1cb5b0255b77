"""DALL-E: an autoregressive transformer over text and image tokens (Ramesh et al. 2021).

The model as the trainer sees it, see context.py: batches, the loss, likelihoods and snapshots. The
network itself is dalle_network.py, drawing from it sampling.py.

B batch, T text states, I = R x C image states, d width; C captions, N candidates of a caption.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dalle_jax.models import decoding, losses, transformer
from dalle_jax.models.context import Context, unconstrained
from dalle_jax.models.dalle_network import (
    PRESETS, Config, axes, embed_image, embed_text, fit, flops, init)
from dalle_jax.models.sampling import filter_logits, generate, sample_bytes

__all__ = [
    'Config', 'PRESETS', 'fit', 'init', 'axes', 'branches', 'flops', 'batch_spec', 'loss',
    'likelihood', 'text_likelihood', 'generate', 'filter_logits', 'sample_bytes', 'attention_maps',
    'snapshot']

SNAPSHOT_IMAGES = 8


def batch_spec(config: Config, frozen: Mapping[str, Any] | None = None
               ) -> dict[str, jax.ShapeDtypeStruct]:
    """One example: text ids, zero-padded, and the image; or its codes without a tokenizer."""
    text = jax.ShapeDtypeStruct((config.text_length - 1,), jnp.int32)
    if frozen and 'image' in frozen:
        size = frozen['image'].config.image_size
        return {'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8), 'text': text}
    return {'codes': jax.ShapeDtypeStruct(config.grid, jnp.int32), 'text': text}


def branches(config: Config) -> Any:
    """Shapes of the gradient scales of the resblocks."""
    return {'transformer': transformer.branches(config.blocks, lambda shape: shape)}


def _states(params, config, text, codes, dtype, constrain, scales=None):
    """Last states of the text [B, T - 1, d] and of the image [B, I, d]."""
    # Whole tables: a lookup in divided ones would gather the states of the global batch instead.
    tables = jax.tree.map(lambda x: constrain(x, (None,) * x.ndim),
                          {kind: params[kind] for kind in ('text', 'image')})
    x = jnp.concatenate([embed_text(tables, text), embed_image(tables, codes[:, :-1])], axis=1)
    x = transformer.forward(params['transformer'], config.blocks, x, dtype=dtype,
                            remat=config.remat, constrain=constrain,
                            scales=scales and scales['transformer'])
    # The last text state has no target.
    of_text, _, of_image = lax.split(x, (config.text_length - 1, 1, config.image_length), axis=1)
    return of_text, of_image


def text_targets(config: Config, text: jax.Array) -> jax.Array:
    """Which text slots of ids int32 [B, T - 1] count in the loss, as 0 or 1, float32 [B, T - 1]."""
    pad = text == 0
    allowed = {'all': text.shape[1], 'first': 1, 'none': 0}[config.pads]
    return (~pad | (jnp.cumsum(pad, axis=1) <= allowed)).astype(jnp.float32)


def loss(params: Any, model_state: Any, batch: Mapping[str, jax.Array], ctx: Context
         ) -> tuple[Any, Any, Any]:
    """Cross-entropies of text and image tokens, each a mean over its tokens, weighted 1:7.

    Args:
      batch: 'text' int32 [B, T - 1], and 'codes' int32 [B, R, C] or 'image' uint8 [B, S, S, 3],
        which ctx.frozen['image'] turns into codes.

    Returns:
      terms 'text' and 'image', nats per token; metrics, only where ctx.train is False:
      text_accuracy, image_accuracy, and text_nats_per_token, of the captions without padding.

    With config.caption_dropout, that share of the examples is trained with the empty caption, and
    the text of these has no loss: the distribution of captions stays what it is.
    """
    config, text = ctx.config, batch['text']
    codes = lax.stop_gradient(_codes(batch, ctx)).reshape(len(text), -1)
    counted, everywhere = text_targets(config, text), jnp.ones(codes.shape)
    if ctx.train and config.caption_dropout:
        kept = jax.random.bernoulli(ctx.key, 1 - config.caption_dropout, (len(text), 1))
        text, counted = jnp.where(kept, text, 0), counted * kept
    of_text, of_image = _states(params, config, text, codes, ctx.dtype, ctx.constrain, ctx.scales)
    targets = {'text': (of_text, text, counted), 'image': (of_image, codes, everywhere)}
    sums = {kind: losses.vocabulary_loss(x, params['heads'][kind], ids, weights, ctx.dtype)
            for kind, (x, ids, weights) in targets.items()}
    # A (micro)batch whose captions are all dropped has no text target: 0 / 1 instead of 0 / 0.
    counts = {'text': jnp.maximum(counted.sum(), 1), 'image': float(codes.size)}
    weights = {'text': config.text_weight, 'image': config.image_weight}
    terms = {kind: losses.Term(sums[kind][0], counts[kind], weights[kind]) for kind in sums}
    if ctx.train:
        return terms, {}, model_state
    pieces = (text > 0).astype(jnp.float32)
    of_pieces, _ = losses.vocabulary_loss(of_text, params['heads']['text'], text, pieces, ctx.dtype)
    return terms, {
        'text_accuracy': (sums['text'][1], counts['text']),
        'image_accuracy': (sums['image'][1], counts['image']),
        'text_nats_per_token': (of_pieces, pieces.sum())}, model_state


def _codes(batch, ctx):
    if 'codes' in batch:
        return batch['codes']
    if 'image' not in ctx.frozen:
        raise ValueError("dalle: the batch has no 'codes' and ctx.frozen no 'image' tokenizer to "
                         'make them; name a trained dVAE in frozen.image')
    tokenizer = ctx.frozen['image']
    return tokenizer.module.encode(tokenizer.params, tokenizer.config, batch['image'],
                                   losses.exact(ctx.dtype))


def likelihood(params: Any, config: Config, text: jax.Array, ids: jax.Array,
               dtype: Any = jnp.float32, constrain: Any = unconstrained
               ) -> tuple[jax.Array, jax.Array]:
    """Log-likelihoods in nats: ln p(text) and ln p(image | text).

    Args:
      text: int32 [B, T - 1].
      ids: int32 [B, R, C].
      constrain: Context.constrain.

    Returns:
      float32 [B] each; of the text, the slots that config.pads counts.
    """
    ids = ids.reshape(len(ids), -1)
    of_text, of_image = _states(params, config, text, ids, dtype, constrain)
    nats = losses.vocabulary_cross_entropy(of_image, params['heads']['image'], ids, dtype)
    return _text_likelihood(params, config, text, of_text, dtype), -nats.sum(axis=1)


def text_likelihood(params: Any, config: Config, text: jax.Array, dtype: Any = jnp.float32,
                    constrain: Any = unconstrained) -> jax.Array:
    """The first of `likelihood`, without an image: ln p(text), float32 [B]."""
    x, _ = decoding.prefill(params['transformer'], config.blocks, embed_text(params, text),
                            dtype=dtype, constrain=constrain)
    return _text_likelihood(params, config, text, x[:, :-1], dtype)


def _text_likelihood(params, config, text, x, dtype):
    nats = losses.vocabulary_cross_entropy(x, params['heads']['text'], text, dtype)
    return -(nats * text_targets(config, text)).sum(axis=1)


def attention_maps(params: Any, config: Config, text: jax.Array, ids: jax.Array
                   ) -> dict[str, jax.Array]:
    """Attention weights of one example, averaged over heads, in the first layer of each pattern.

    Args:
      text: int32 [T - 1].
      ids: int32 [R, C].

    Returns:
      pattern -> float32 [L, L], queries by keys.
    """
    x = jnp.concatenate([embed_text(params, text[None]),
                         embed_image(params, ids.reshape(1, -1)[:, :-1])], axis=1)
    maps = transformer.attention_maps(params['transformer'], config.blocks, x)
    return {pattern: weights[0] for pattern, weights in maps.items()}


def snapshot(params: Any, model_state: Any, batch: Mapping[str, jax.Array], ctx: Context
             ) -> dict[str, jax.Array]:
    """Attention weights of the first example; with a tokenizer also pictures of some examples.

    'matrix/PATTERN' [L, L]; 'images/originals', 'images/tokenised' (decoded codes) and
    'images/samples' (drawn from the captions at temperature 1, always with the same keys).
    """
    del model_state
    config, text = ctx.config, jnp.asarray(batch['text'][:SNAPSHOT_IMAGES])
    batch = {name: jnp.asarray(value[:SNAPSHOT_IMAGES]) for name, value in batch.items()}
    codes = _codes(batch, ctx)
    maps = attention_maps(params, config, text[0], codes[0])
    arrays = {f'matrix/{pattern}': weights for pattern, weights in maps.items()}
    if 'image' in ctx.frozen:
        tokenizer = ctx.frozen['image']
        keys = jax.random.split(jax.random.key(0, impl='threefry2x32'), (len(text), 1))
        ids, _ = generate(params, config, text, keys=keys, dtype=ctx.dtype)
        tokenised, samples = jnp.split(tokenizer.module.decode(
            tokenizer.params, tokenizer.config, jnp.concatenate([codes, ids[:, 0]])), 2)
        arrays |= {'images/tokenised': tokenised, 'images/samples': samples}
        if 'image' in batch:
            arrays['images/originals'] = batch['image']
    return arrays
