"""The image tokenizer of VQGAN: images to a grid of codes and back, with published weights.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", sec. 3.1 and app. C;
the released code. It takes the place of the dVAE under a transformer (`encode`, `decode`, `grid`,
`vocab`). It is not trained here: its loss needs a discriminator and a perceptual metric.

B batch, S image side, h = w = S / f grid side, K codes, n channels of a code's embedding.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.models.layers import contract, init_module, module_axes
from dalle_jax.models.resnet import Conv, upsample


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the defaults are those of the released f16 model with 16,384 codes.

    Attributes:
      image_size: S; other sides that `factor` divides work as well.
      vocab: K.
      widths: channels of each resolution, finest first; each but the first halves the grid.
      blocks: residual blocks of a resolution; the decoder has one more.
      attention: resolutions with self-attention behind every block, 0 the finest.
      latent: channels between encoder and codebook.
      embedding: n.
      quantizer: 'nearest' code; or 'logits', the most probable one of a 1x1 convolution (the
        models trained with the Gumbel-softmax).

    Raises:
      ValueError: on sizes that do not fit together.
    """

    image_size: int = 256
    vocab: int = 16_384
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    latent: int = 256
    embedding: int = 256
    quantizer: str = 'nearest'

    def __post_init__(self):
        for name in ('widths', 'attention'):  # read back from JSON they are lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.quantizer not in ('nearest', 'logits'):
            raise ValueError(f"vqgan: quantizer={self.quantizer!r}; choose 'nearest' or 'logits'")
        if not self.widths or any(width % GROUPS for width in self.widths):
            raise ValueError(f'vqgan: widths={self.widths} must be multiples of {GROUPS}, the '
                             'groups of its normalisation')
        if self.image_size % self.factor:
            raise ValueError(f'vqgan: image_size={self.image_size} is not divisible by the '
                             f'downsampling factor {self.factor}')

    @property
    def factor(self) -> int:
        """Pixels along a side of the square that one code stands for."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of an image, (rows, columns)."""
        return self.image_size // self.factor, self.image_size // self.factor


GROUPS = 32

PRESETS = {
    'f16': Config(),
    'f16_1024': Config(vocab=1024),
    'f8': Config(vocab=8192, widths=(128, 128, 256, 512), attention=(3,), quantizer='logits'),
}


class Block(nn.Module):
    """x + (norm, swish, 3x3 convolution) twice."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = x
        for i in ('1', '2'):
            h = Conv(self.features, 3, self.dtype, name=f'conv{i}')(
                nn.swish(_norm(f'norm{i}')(h))).astype(jnp.float32)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, self.dtype, name='nin_shortcut')(x).astype(jnp.float32)
        return x + h


class Attention(nn.Module):
    """x + self-attention of all positions, one head."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        h = _norm('norm')(x)
        q, k, v = (Conv(c, 1, self.dtype, name=name)(h).reshape(b, height * width, c)
                   for name in 'qkv')
        scores = contract('bqc,bkc->bqk', q, k, self.dtype) * c ** -0.5
        h = contract('bqk,bkc->bqc', nn.softmax(scores), v, self.dtype).reshape(x.shape)
        return x + Conv(c, 1, self.dtype, name='proj_out')(h).astype(jnp.float32)


class Halve(nn.Module):
    """3x3 convolution of every second pixel; zeros are added below and to the right only."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (3, 3, *x.shape[-1:] * 2))
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias[None, None, None]))
        return (bias + jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((0, 1), (0, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
                ).astype(jnp.float32)


class Encoder(nn.Module):
    """Images [B, S, S, 3] in [-1, 1] -> latent [B, h, w, latent]."""

    config: Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = Conv(c.widths[0], 3, self.dtype, name='conv_in')(x).astype(jnp.float32)
        for level, width in enumerate(c.widths):
            if level:
                x = Halve(self.dtype, name=f'down_{level - 1}_downsample')(x)
            for i in range(c.blocks):
                x = Block(width, self.dtype, name=f'down_{level}_block_{i}')(x)
                if level in c.attention:
                    x = Attention(self.dtype, name=f'down_{level}_attn_{i}')(x)
        return _end(_middle(x, self.dtype), c.latent, self.dtype)


class Decoder(nn.Module):
    """Latent [B, h, w, latent] -> images [B, S, S, 3] in about [-1, 1]."""

    config: Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = Conv(c.widths[-1], 3, self.dtype, name='conv_in')(x).astype(jnp.float32)
        x = _middle(x, self.dtype)
        for level, width in reversed([*enumerate(c.widths)]):
            for i in range(c.blocks + 1):
                x = Block(width, self.dtype, name=f'up_{level}_block_{i}')(x)
                if level in c.attention:
                    x = Attention(self.dtype, name=f'up_{level}_attn_{i}')(x)
            if level:
                x = Conv(width, 3, self.dtype, name=f'up_{level}_upsample')(upsample(x))
                x = x.astype(jnp.float32)
        return _end(x, 3, jnp.float32)


def _norm(name):
    return nn.GroupNorm(GROUPS, epsilon=1e-6, name=name)


def _middle(x, dtype):
    x = Block(x.shape[-1], dtype, name='mid_block_1')(x)
    x = Attention(dtype, name='mid_attn_1')(x)
    return Block(x.shape[-1], dtype, name='mid_block_2')(x)


def _end(x, features, dtype):
    return Conv(features, 3, dtype, name='conv_out')(nn.swish(_norm('norm_out')(x)))


def _parts(config, dtype=jnp.float32):
    """The modules and what each is called with for one code."""
    def shape(side, channels):
        return jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)

    parts = {'encoder': (Encoder(config, dtype), shape(config.factor, 3)),
             'quant_conv': (Conv(config.embedding, 1), shape(1, config.latent)),
             'post_quant_conv': (Conv(config.latent, 1), shape(1, config.embedding)),
             'decoder': (Decoder(config, dtype), shape(1, config.latent))}
    if config.quantizer == 'logits':
        parts['logits'] = Conv(config.vocab, 1), shape(1, config.embedding)
    return parts


def init(config: Config, key: jax.Array) -> tuple[Any, dict]:
    """Random parameters, float32, and no model state; `codebook` is [K, n]."""
    keys = jax.random.split(key, 6)
    params = {name: init_module(module, k, shape)
              for k, (name, (module, shape)) in zip(keys, _parts(config).items())}
    return params | {'codebook': jax.random.normal(keys[5], (config.vocab, config.embedding))}, {}


def axes(config: Config) -> Any:
    """Logical axes like those of the dVAE."""
    return {name: module_axes(module, shape) for name, (module, shape) in _parts(config).items()
            } | {'codebook': ('vocab', None)}


def batch_spec(config: Config, frozen: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """One example: the image."""
    del frozen
    return {'image': jax.ShapeDtypeStruct((config.image_size, config.image_size, 3), jnp.uint8)}


def latent(params: Any, config: Config, images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """What is quantised, float32 [B, h, w, n], of uint8 images [B, S, S, 3].

    Raises ValueError where the factor does not divide the sides.
    """
    height, width = images.shape[1:3]
    if height % config.factor or width % config.factor:
        raise ValueError(f'vqgan: images of {height}x{width} are not divisible by the downsampling '
                         f'factor {config.factor}; crop or resize them')
    x = images.astype(jnp.float32) / 127.5 - 1
    x = Encoder(config, dtype).apply({'params': params['encoder']}, x).astype(jnp.float32)
    return Conv(config.embedding, 1).apply({'params': params['quant_conv']}, x)


def encode(params: Any, config: Config, images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Codes, int32 [B, h, w], of uint8 images [B, S, S, 3]."""
    x = latent(params, config, images, dtype)
    if config.quantizer == 'logits':
        scores = Conv(config.vocab, 1).apply({'params': params['logits']}, x)
    else:  # |x - e|^2 without |x|^2
        codes = params['codebook']
        scores = 2 * contract('bhwn,kn->bhwk', x, codes, jnp.float32)
        scores -= jnp.sum(codes * codes, axis=-1)[None, None, None]
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def decode(params: Any, config: Config, ids: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Images, float32 [B, S, S, 3] in [0, 1], of codes [B, h, w]."""
    x = Conv(config.latent, 1).apply({'params': params['post_quant_conv']},
                                     params['codebook'][ids])
    x = Decoder(config, dtype).apply({'params': params['decoder']}, x)
    return jnp.clip((x + 1) / 2, 0.0, 1.0)
