"""DALL-E: an autoregressive transformer over text and image tokens.

Ramesh et al. 2021, sec. 2.2 and app. B. One sequence of T text and I image states:

    state   start-of-text  t0 ... t(T-2)    start-of-image  i0 ... i(I-2)
    target  t0 ...  t(T-2)  (none)          i0              i1 ... i(I-1)

A state stands at the slot of its target: positions, rows, columns and attention patterns index the
slot. What the paper leaves open is decided as Child et al. 2019 do, see Config.

B batch, T text states, I = R x C image states, d width; C captions, N candidates of a caption.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dalle_jax.models import attention, losses, transformer
from dalle_jax.models.context import Context, unconstrained
from dalle_jax.models.layers import Declared, Param, contract, init_module, module_axes

SNAPSHOT_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a DALL-E; the defaults are the paper's 12-billion-parameter model.

    Attributes:
      depth: layers.
      width: d.
      heads: attention heads; the paper's have 64 channels each.
      text_length: T, of which the start of text takes one: a caption has at most T - 1 tokens.
      text_vocab: text tokens. Id 0 is padding.
      grid: rows and columns of image tokens.
      image_vocab: image tokens.
      kernel: odd side of the convolutional pattern's window.
      patterns: attention pattern of each layer; None: the paper's, transformer.dalle_patterns.
      activation: of the MLP blocks, a key of transformer.ACTIVATIONS. Not stated in the paper;
        this one is that of Child et al. 2019.
      std: of initial matrices; those writing into the residual stream have std / sqrt(2 depth).
        Not stated in the paper.
      embed_std: of initial embeddings.
      remat: what the backward pass recomputes, a key of transformer.REMAT. The paper recomputes
        the inside of all blocks.
      text_weight, image_weight: of the two terms of the loss.
      pads: which padded text slots are targets (id 0): 'all', 'first' (an end of text) or 'none'.
        Not stated in the paper.

    Raises:
      ValueError: on values that do not fit together.
    """

    depth: int = 64
    width: int = 3968
    heads: int = 62
    text_length: int = 256
    text_vocab: int = 16_384
    grid: tuple[int, int] = (32, 32)
    image_vocab: int = 8_192
    kernel: int = 11
    patterns: tuple[str, ...] | None = None
    activation: str = 'quick_gelu'
    std: float = 0.02
    embed_std: float = 0.02
    remat: str = 'full'
    text_weight: float = 1 / 8
    image_weight: float = 7 / 8
    pads: str = 'all'

    def __post_init__(self):
        # A config read back from JSON has lists; only tuples keep the dataclass hashable.
        object.__setattr__(self, 'grid', tuple(self.grid))
        if self.patterns is not None:
            object.__setattr__(self, 'patterns', tuple(self.patterns))

        def require(holds, name, rule):
            if not holds:
                raise ValueError(f'dalle: {name}={getattr(self, name)!r}: {rule}')

        require(self.text_length >= 2, 'text_length', 'must be at least 2: the start and a token')
        for name in ('text_vocab', 'image_vocab'):
            require(getattr(self, name) >= 2, name, 'must be at least 2')
        for name in ('text_weight', 'image_weight', 'std', 'embed_std'):
            require(getattr(self, name) >= 0, name, 'must not be negative')
        require(len(self.grid) == 2, 'grid', 'give (rows, columns)')
        require(self.remat in transformer.REMAT, 'remat', f'choose one of {[*transformer.REMAT]}')
        require(self.pads in ('all', 'first', 'none'), 'pads', "choose 'all', 'first' or 'none'")
        require(self.patterns is None or 'bidirectional' not in self.patterns, 'patterns',
                'images are drawn token by token: no pattern may see ahead')
        _ = self.blocks  # checks the rest

    @property
    def image_length(self) -> int:
        """I, image tokens of a picture."""
        return self.grid[0] * self.grid[1]

    @functools.cached_property
    def blocks(self) -> transformer.BlockConfig:
        """The stack of layers."""
        patterns = self.patterns or transformer.dalle_patterns(self.depth)
        return transformer.BlockConfig(
            self.depth, self.width, self.heads, patterns,
            attention.Layout(self.text_length, *self.grid, self.kernel),
            activation=self.activation, std=self.std)


PRESETS = {
    'tiny': Config(depth=4, width=256, heads=4, remat='none'),
    'small': Config(depth=12, width=512, heads=8, remat='none'),
    'base': Config(depth=24, width=768, heads=12, remat='dots'),
    'large': Config(depth=32, width=1024, heads=16, remat='dots'),
    '0.7b': Config(width=960, heads=15),
    '1.3b': Config(width=1280, heads=20),
    '1.4b': Config(width=1344, heads=21),
    '2.8b': Config(width=1920, heads=30),
    '5.6b': Config(width=2688, heads=42),
    '12b': Config(),
}


def fit(config: Config, *, image_tokenizer_config: Any = None, text_vocab: int | None = None
        ) -> Config:
    """The config with the sizes that its tokenizers have; what is None stays as it is."""
    if image_tokenizer_config is not None:
        config = dataclasses.replace(config, grid=image_tokenizer_config.grid,
                                     image_vocab=image_tokenizer_config.vocab)
    return config if text_vocab is None else dataclasses.replace(config, text_vocab=text_vocab)


def _declared(config):
    d, std = config.width, config.embed_std

    def table(entries):
        return Param((entries, d), (None, 'embed'), std)

    def start():
        return Param((d,), (None,), std)

    return Declared({
        'text': {'tokens': table(config.text_vocab), 'pads': table(config.text_length),
                 'positions': table(config.text_length), 'start': start()},
        'image': {'tokens': table(config.image_vocab), 'rows': table(config.grid[0]),
                  'columns': table(config.grid[1]), 'start': start()},
        'transformer': transformer.declare(config.blocks),
        'heads': {'text': Param((d, config.text_vocab), ('embed', None), config.std),
                  'image': Param((d, config.image_vocab), ('embed', None), config.std)},
    })


def init(config: Config, key: jax.Array) -> tuple[Any, dict]:
    """Parameters {'text', 'image', 'transformer', 'heads'}, float32, and no model state."""
    return init_module(_declared(config), key), {}


def axes(config: Config) -> Any:
    """Logical axes 'embed', 'heads' (times 3 D), 'mlp' and 'layers' (of a stack)."""
    return module_axes(_declared(config))


def batch_spec(config: Config, frozen: Mapping[str, Any] | None = None
               ) -> dict[str, jax.ShapeDtypeStruct]:
    """One example: text ids, zero-padded, and the image; or its codes without a tokenizer."""
    text = jax.ShapeDtypeStruct((config.text_length - 1,), jnp.int32)
    if frozen and 'image' in frozen:
        size = frozen['image'].config.image_size
        return {'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8), 'text': text}
    return {'codes': jax.ShapeDtypeStruct(config.grid, jnp.int32), 'text': text}


def _embed_text(params, text):
    """Text states [B, T, d] of ids [B, T - 1]: start, then each token or its slot's padding."""
    p = params['text']
    if text.shape[1] != len(p['pads']) - 1:
        raise ValueError(f'dalle: captions of {text.shape[1]} tokens; pad or cut them to '
                         f'text_length - 1 = {len(p["pads"]) - 1}')
    tokens = jnp.where((text == 0)[..., None], p['pads'][None, 1:], p['tokens'][text])
    start = jnp.broadcast_to(p['start'], (len(text), 1, p['start'].size))
    return jnp.concatenate([start, tokens], axis=1) + p['positions'][None]


def _embed_image(params, ids):
    """Image states [B, I, d] of the first I - 1 image tokens [B, I - 1]."""
    p = params['image']
    start = jnp.broadcast_to(p['start'], (len(ids), 1, p['start'].size))
    places = (p['rows'][:, None] + p['columns'][None]).reshape(1, -1, p['start'].size)
    return jnp.concatenate([start, p['tokens'][ids]], axis=1) + places


def _logits(params, x, kind, dtype):
    """float32 logits [..., V] of one of the two vocabularies from states [B, L, d]."""
    rows = contract('nd,dv->nv', x.reshape(-1, x.shape[-1]), params['heads'][kind], dtype)
    return rows.reshape(*x.shape[:-1], -1)


def _negative_log_likelihoods(params, config, text, codes, dtype, constrain):
    """Cross-entropies and logits: text [B, T - 1], image [B, I], and the logits of both."""
    codes = codes.reshape(len(codes), -1)
    # Whole tables: a lookup in divided ones would gather the states of the global batch instead.
    tables = jax.tree.map(lambda x: constrain(x, (None,) * x.ndim),
                          {kind: params[kind] for kind in ('text', 'image')})
    x = jnp.concatenate([_embed_text(tables, text), _embed_image(tables, codes[:, :-1])], axis=1)
    x = transformer.forward(params['transformer'], config.blocks, x, dtype=dtype,
                            remat=config.remat, constrain=constrain)
    # The last text state has no target.
    of_text, _, of_image = lax.split(x, (config.text_length - 1, 1, config.image_length), axis=1)
    logits = _logits(params, of_text, 'text', dtype), _logits(params, of_image, 'image', dtype)
    return (losses.cross_entropy(logits[0], text), losses.cross_entropy(logits[1], codes), logits)


def _text_targets(config, text):
    """Which text slots count in the loss, as 0 or 1, float32 [B, T - 1]."""
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
      terms 'text' and 'image', nats per token; metrics text_accuracy and image_accuracy, only
      where ctx.train is False.
    """
    config, text = ctx.config, batch['text']
    codes = lax.stop_gradient(_codes(batch, ctx))
    of_text, of_image, logits = _negative_log_likelihoods(
        params, config, text, codes, ctx.dtype, ctx.constrain)
    counted = _text_targets(config, text)
    terms = {'text': losses.Term((of_text * counted).sum(), counted.sum(), config.text_weight),
             'image': losses.Term(of_image.sum(), float(of_image.size), config.image_weight)}
    if ctx.train:
        return terms, {}, model_state
    hit_text = (logits[0].argmax(-1) == text) * counted
    hit_image = logits[1].argmax(-1) == codes.reshape(of_image.shape)
    return terms, {'text_accuracy': (hit_text.sum(), counted.sum()),
                   'image_accuracy': (hit_image.sum(), float(hit_image.size))}, model_state


def _codes(batch, ctx):
    if 'codes' in batch:
        return batch['codes']
    if 'image' not in ctx.frozen:
        raise ValueError("dalle: the batch has no 'codes' and ctx.frozen no 'image' tokenizer to "
                         'make them; name a trained dVAE in frozen.image')
    tokenizer = ctx.frozen['image']
    return tokenizer.module.encode(tokenizer.params, tokenizer.config, batch['image'])


def likelihood(params: Any, config: Config, text: jax.Array, ids: jax.Array,
               dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Log-likelihoods in nats: ln p(text) and ln p(image | text).

    Args:
      text: int32 [B, T - 1].
      ids: int32 [B, R, C].

    Returns:
      float32 [B] each; of the text, the slots that config.pads counts.
    """
    of_text, of_image, _ = _negative_log_likelihoods(
        params, config, text, ids, dtype, unconstrained)
    return -(of_text * _text_targets(config, text)).sum(-1), -of_image.sum(-1)


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


def generate(params: Any, config: Config, text: jax.Array, *, keys: jax.Array,
             temperature: jax.Array | float = 1.0, top_k: int = 0, top_p: jax.Array | float = 1.0,
             prefix: jax.Array | None = None, dtype: Any = jnp.float32
             ) -> tuple[jax.Array, jax.Array]:
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
      prefix: int32 [C, n], image tokens that each candidate starts with, or None.
      dtype: of the matrix products and caches.

    Returns:
      int32 tokens [C, N, R, C], and the log-likelihood of all of them (also of the prefix) given
      the caption at temperature 1 and without filters, float32 [C, N], in nats.
    """
    captions, candidates = keys.shape
    if 'rbg' in str(jax.random.key_impl(keys)):
        raise ValueError('dalle: numbers of rbg keys depend on the batch; give threefry2x32 keys')
    prefix = jnp.zeros((captions, 0), jnp.int32) if prefix is None else prefix
    kept, left = prefix.shape[1], config.image_length - prefix.shape[1]
    if left < 0:
        raise ValueError(f'dalle: a prefix of {kept} tokens; an image has {config.image_length}')
    given = jnp.pad(prefix, ((0, 0), (0, left)))
    stack, blocks, p = params['transformer'], config.blocks, params['image']
    prompt = transformer.prefill(stack, blocks, _embed_text(params, text), dtype=dtype)

    def draw(carry, scanned):
        caches, previous, logp = carry
        position, given = scanned
        row, column = position // config.grid[1], position % config.grid[1]
        x = jnp.where(position == 0, p['start'][None, None], p['tokens'][previous])
        x += (p['rows'][row] + p['columns'][column])[None, None]
        x, caches = transformer.step(stack, blocks, x, position, prompt, caches, dtype=dtype)
        logits = _logits(params, x, 'image', dtype)
        # The largest of logits / t + noise is a sample; times t, the limit t = 0 is no exception.
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(
            jax.random.fold_in(key, position), (config.image_vocab,))))(keys)
        noisy = filter_logits(logits, temperature, top_k, top_p) + temperature * noise
        token = lax.top_k(noisy, 1)[1][..., 0]  # argmax, which CPUs do not vectorise
        token = jnp.where(position < kept, given[:, None], token)
        return (caches, token, logp - losses.cross_entropy(logits, token)), token

    start = (transformer.empty_caches(blocks, captions, candidates, dtype),
             jnp.zeros((captions, candidates), jnp.int32), jnp.zeros((captions, candidates)))
    (_, _, logp), ids = lax.scan(draw, start, (jnp.arange(config.image_length), given.T))
    return jnp.moveaxis(ids, 0, -1).reshape(captions, candidates, *config.grid), logp


def attention_maps(params: Any, config: Config, text: jax.Array, ids: jax.Array
                   ) -> dict[str, jax.Array]:
    """Attention weights of one example, averaged over heads, in the first layer of each pattern.

    Args:
      text: int32 [T - 1].
      ids: int32 [R, C].

    Returns:
      pattern -> float32 [L, L], queries by keys.
    """
    x = jnp.concatenate([_embed_text(params, text[None]),
                         _embed_image(params, ids.reshape(1, -1)[:, :-1])], axis=1)
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
    maps = jax.jit(attention_maps, static_argnums=1)(params, config, text[0], codes[0])
    arrays = {f'matrix/{pattern}': weights for pattern, weights in maps.items()}
    if 'image' in ctx.frozen:
        tokenizer = ctx.frozen['image']
        keys = jax.random.split(jax.random.key(0, impl='threefry2x32'), (len(text), 1))
        ids, _ = jax.jit(generate, static_argnums=1, static_argnames='dtype')(
            params, config, text, keys=keys, dtype=ctx.dtype)
        decode = functools.partial(jax.jit(tokenizer.module.decode, static_argnums=1),
                                   tokenizer.params, tokenizer.config)
        arrays |= {'images/tokenised': decode(codes), 'images/samples': decode(ids[:, 0])}
        if 'image' in batch:
            arrays['images/originals'] = batch['image']
    return arrays
