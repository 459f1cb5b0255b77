"""CLIP: an image tower and a text tower whose embeddings agree on pairs.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
sec. 2.3 to 2.5: a vision transformer and a causal text transformer, embeddings on the unit
sphere, a symmetric cross-entropy over all pairs of the global batch with a learned temperature.
It chooses among a caption's candidates (Ramesh et al. 2021, sec. 2.6).

B batch, S image side, P = (S / patch)^2 patches, T text tokens, d width of a tower, e embedding.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.models import losses, transformer
from dalle_jax.models.context import Context, unconstrained
from dalle_jax.models.layers import (
    Declared, Param, contract, init_module, layer_norm, module_axes, norm_params)
from dalle_jax.models.resnet import space_to_depth

MAX_LOG_SCALE = math.log(100)  # sec. 2.5: the temperature is clipped so that training is stable
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the training images, in the released code
STD = (0.26862954, 0.26130258, 0.27577711)

couples_batch = True  # every image is a negative of every other one's caption


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the towers; the defaults are ViT-B/32.

    Attributes:
      image_size, patch: S and the side of a patch, in pixels.
      image_width, image_depth, image_heads: the vision transformer.
      text_length: T; a caption may have as many tokens, an end-of-text state is added.
      text_vocab: text tokens; id 0 is padding.
      text_width, text_depth, text_heads: the text transformer.
      embedding: e.
      activation: of the MLP blocks.
      remat: what the backward pass recomputes, a key of transformer.REMAT.

    Raises:
      ValueError: on values that do not fit together.
    """

    image_size: int = 224
    patch: int = 32
    image_width: int = 768
    image_depth: int = 12
    image_heads: int = 12
    text_length: int = 76
    text_vocab: int = 49_408
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    embedding: int = 512
    activation: str = 'quick_gelu'
    remat: str = 'none'

    def __post_init__(self):
        if self.image_size % self.patch:
            raise ValueError(f'clip: image_size={self.image_size} is not divisible by '
                             f'patch={self.patch}; change one of them')
        if self.text_length < 1 or self.text_vocab < 2 or self.embedding < 1:
            raise ValueError(f'clip: text_length={self.text_length}, text_vocab={self.text_vocab} '
                             f'and embedding={self.embedding} must be at least 1, 2 and 1')
        if self.remat not in transformer.REMAT:
            raise ValueError(f'clip: remat={self.remat!r}: choose one of {[*transformer.REMAT]}')
        _ = self.image_blocks, self.text_blocks  # they check the rest

    @property
    def image_blocks(self) -> transformer.BlockConfig:
        """The vision transformer's stack."""
        return self._blocks(self.image_depth, self.image_width, self.image_heads, 'bidirectional')

    @property
    def text_blocks(self) -> transformer.BlockConfig:
        """The text transformer's stack."""
        return self._blocks(self.text_depth, self.text_width, self.text_heads, 'causal')

    def _blocks(self, depth, width, heads, pattern):
        # Std 1 / sqrt(d) for the matrices that read, as in the released code.
        return transformer.BlockConfig(depth, width, heads, (pattern,) * depth,
                                       activation=self.activation, std=width ** -0.5)


PRESETS = {
    'b32': Config(),
    'b16': Config(patch=16),
    'l14': Config(patch=14, image_width=1024, image_depth=24, image_heads=16, text_width=768,
                  text_heads=12, embedding=768),
}


def fit(config: Config, *, image_tokenizer_config: Any = None, text_vocab: int) -> Config:
    """The config with its tokenizer's vocabulary."""
    del image_tokenizer_config
    return dataclasses.replace(config, text_vocab=text_vocab)


def _declared(config):
    d, t = config.image_width, config.text_width
    places = (config.image_size // config.patch) ** 2 + 1
    values = 3 * config.patch ** 2
    return Declared({
        'image': {
            'patches': {'kernel': Param((values, d), (None, 'embed'), values ** -0.5)},
            'class': Param((d,), (None,), d ** -0.5),
            'positions': Param((places, d), (None, 'embed'), d ** -0.5),
            'norm_pre': norm_params(d),
            'transformer': transformer.declare(config.image_blocks),
            'projection': Param((d, config.embedding), ('embed', None), d ** -0.5),
        },
        'text': {
            'tokens': Param((config.text_vocab, t), (None, 'embed'), 0.02),
            'positions': Param((config.text_length + 1, t), (None, 'embed'), 0.01),
            'transformer': transformer.declare(config.text_blocks),
            'projection': Param((t, config.embedding), ('embed', None), t ** -0.5),
        },
        'log_scale': Param((), (), mean=math.log(1 / 0.07)),
    })


def init(config: Config, key: jax.Array) -> tuple[Any, dict]:
    """Parameters {'image', 'text', 'log_scale'}, float32, and no model state."""
    return init_module(_declared(config), key), {}


def axes(config: Config) -> Any:
    """Logical axes as of the transformer; embeddings are replicated."""
    return module_axes(_declared(config))


def constrain_params(params: Any) -> Any:
    """Clips the temperature after an update (sec. 2.5)."""
    return params | {'log_scale': jnp.minimum(params['log_scale'], MAX_LOG_SCALE)}


def batch_spec(config: Config, frozen: Mapping[str, Any] | None = None
               ) -> dict[str, jax.ShapeDtypeStruct]:
    """One example: the image and text ids, zero-padded."""
    del frozen
    size = config.image_size
    return {'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8),
            'text': jax.ShapeDtypeStruct((config.text_length,), jnp.int32)}


def flops(config: Config) -> int:
    """Model FLOPs of one pair, forward: both towers; see transformer.flops.

    Not the comparisons with the rest of a batch.
    """
    def tower(blocks, states, pairs):
        projection = 2 * blocks.width * config.embedding
        return transformer.flops(blocks, states, blocks.depth * pairs) + projection

    patches, states = (config.image_size // config.patch)**2, config.text_length + 1
    image = tower(config.image_blocks, patches + 1, (patches + 1)**2)
    text = tower(config.text_blocks, states, states * (states + 1) // 2)
    return 2 * 3 * config.image_size**2 * config.image_width + image + text


def embed_image(params: Any, config: Config, images: jax.Array, dtype: Any = jnp.float32,
                constrain: Any = unconstrained) -> jax.Array:
    """Unit vectors float32 [B, e] of uint8 images [B, S, S, 3]."""
    p = params['image']
    x = images.astype(jnp.float32) / 255
    x = (x - jnp.reshape(jnp.array(MEAN), (1, 1, 1, 3))) / jnp.reshape(jnp.array(STD), (1, 1, 1, 3))
    x = space_to_depth(x, config.patch).reshape(len(x), -1, p['patches']['kernel'].shape[0])
    x = contract('bpv,vd->bpd', x, p['patches']['kernel'], dtype)
    start = jnp.broadcast_to(p['class'], (len(x), 1, config.image_width))
    x = jnp.concatenate([start, x], axis=1) + p['positions'][None]
    x = layer_norm(x, p['norm_pre'], config.image_blocks.eps)
    x = transformer.forward(p['transformer'], config.image_blocks, x, dtype=dtype,
                            remat=config.remat, constrain=constrain)
    return _unit(contract('bd,de->be', x[:, 0], p['projection'], jnp.float32))


def embed_text(params: Any, config: Config, text: jax.Array, dtype: Any = jnp.float32,
               constrain: Any = unconstrained) -> jax.Array:
    """Unit vectors float32 [B, e] of ids int32 [B, T], read at the first padding (end of text)."""
    p = params['text']
    text = jnp.pad(text, ((0, 0), (0, 1)))
    end = jnp.argmax(text == 0, axis=1)
    x = p['tokens'][text] + p['positions'][None]
    x = transformer.forward(p['transformer'], config.text_blocks, x, dtype=dtype,
                            remat=config.remat, constrain=constrain)
    x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    return _unit(contract('bd,de->be', x, p['projection'], jnp.float32))


def score(params: Any, config: Config, images: jax.Array, text: jax.Array,
          dtype: Any = jnp.float32) -> jax.Array:
    """Cosine of each image uint8 [B, S, S, 3] and its caption's ids int32 [B, T]; float32 [B]."""
    image = embed_image(params, config, images, dtype)
    return jnp.sum(image * embed_text(params, config, text, dtype), axis=-1)


def loss(params: Any, model_state: Any, batch: Mapping[str, jax.Array], ctx: Context
         ) -> tuple[Any, Any, Any]:
    """Symmetric cross-entropy over the batch; the negatives are all other pairs of it.

    Terms 'image_to_text' and 'text_to_image', half each; metrics: accuracy of finding an image's
    caption, and the scale 1 / temperature.
    """
    config = ctx.config
    image = embed_image(params, config, batch['image'], ctx.dtype, ctx.constrain)
    text = embed_text(params, config, batch['text'], ctx.dtype, ctx.constrain)
    scale = jnp.exp(params['log_scale'])
    logits = scale * contract('ie,te->it', image, text, jnp.float32)
    own = jnp.arange(len(logits))
    count = float(len(logits))
    terms = {'image_to_text': losses.Term(losses.cross_entropy(logits, own).sum(), count, 0.5),
             'text_to_image': losses.Term(losses.cross_entropy(logits.T, own).sum(), count, 0.5)}
    # A twin in the batch has the same caption: either of the two is right.
    found = logits[own, own] >= logits.max(axis=1)
    return terms, {'accuracy': (found.sum(), count), 'scale': (scale, 1.0)}, model_state


def snapshot(params: Any, model_state: Any, batch: Mapping[str, jax.Array], ctx: Context
             ) -> dict[str, jax.Array]:
    """The images, and the similarity of each with each caption, in [0, 1]."""
    del model_state
    image = embed_image(params, ctx.config, batch['image'], ctx.dtype)
    text = embed_text(params, ctx.config, batch['text'], ctx.dtype)
    return {'images/originals': batch['image'],
            'matrix/similarity': (1 + contract('ie,te->it', image, text, jnp.float32)) / 2}


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
