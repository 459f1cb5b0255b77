"""The network of DALL-E: sizes, parameters, embeddings and logits.

Ramesh et al. 2021, sec. 2.2 and app. B. One sequence of T text and I image states:

    state   start-of-text  t0 ... t(T-2)    start-of-image  i0 ... i(I-2)
    target  t0 ...  t(T-2)  (none)          i0              i1 ... i(I-1)

A state stands at the slot of its target: positions, rows, columns and attention patterns index the
slot. What the paper leaves open is decided as Child et al. 2019 do, see Config.

B batch, T text states, I = R x C image states, d width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.models import transformer
from dalle_jax.models.layers import (
    Declared, Param, contract, init_module, module_axes, tiled_product)
from dalle_jax.models.patterns import Layout, visible_pairs


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
      attention: how it is computed, one of attention.IMPLEMENTATIONS; all yield the same.
      caption_dropout: share of the training captions that are replaced by the empty one, which
        sampling with guidance needs; 0.1 to 0.2 are usual. Not in the paper.
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
    attention: str = 'auto'
    caption_dropout: float = 0.0
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
        require(0 <= self.caption_dropout < 1, 'caption_dropout', 'must be in [0, 1)')
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
            Layout(self.text_length, *self.grid, self.kernel),
            activation=self.activation, std=self.std, attention=self.attention)


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


def embed_text(params, text):
    """Text states [B, T, d] of ids [B, T - 1]: start, then each token or its slot's padding."""
    p = params['text']
    if text.shape[1] != len(p['pads']) - 1:
        raise ValueError(f'dalle: captions of {text.shape[1]} tokens; pad or cut them to '
                         f'text_length - 1 = {len(p["pads"]) - 1}')
    tokens = jnp.where((text == 0)[..., None], p['pads'][None, 1:], p['tokens'][text])
    start = jnp.broadcast_to(p['start'], (len(text), 1, p['start'].size))
    return jnp.concatenate([start, tokens], axis=1) + p['positions'][None]


def embed_image(params, ids):
    """Image states [B, I, d] of the first I - 1 image tokens [B, I - 1]."""
    p = params['image']
    start = jnp.broadcast_to(p['start'], (len(ids), 1, p['start'].size))
    places = (p['rows'][:, None] + p['columns'][None]).reshape(1, -1, p['start'].size)
    return jnp.concatenate([start, p['tokens'][ids]], axis=1) + places


def logits(params, x, kind, dtype):
    """float32 logits [..., V] of one of the two vocabularies from states [B, L, d]."""
    kernel, rows = params['heads'][kind], x.reshape(-1, x.shape[-1])
    if kernel.ndim == 3:
        rows = tiled_product(rows, kernel, dtype)
    else:
        rows = contract('nd,dv->nv', rows, kernel, dtype)
    return rows.reshape(*x.shape[:-1], -1)


def flops(config: Config) -> int:
    """Model FLOPs of the forward pass of one example; a training step has three times as many.

    See transformer.flops; and the heads, but no lookups and no recomputation.
    """
    text, image, blocks = config.text_length, config.image_length, config.blocks
    pairs = sum(visible_pairs(kind, blocks.layout) for kind in blocks.patterns)
    heads = (text - 1) * config.text_vocab + image * config.image_vocab
    return transformer.flops(blocks, text + image, pairs) + 2 * config.width * heads
