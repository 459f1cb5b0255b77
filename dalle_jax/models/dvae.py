"""The discrete variational autoencoder: images to a grid of codes and back.

Ramesh et al. 2021, sec. 2.1 and app. A. `Config()` is the paper's model in every constant; what the
paper does not have (patch, bottleneck, likelihood 'mse', warmup_steps, codebook_init) is off
there and makes small models train in minutes.

B batch, S image side, f downsampling factor, h = w = S / f grid side, K codes, n channels of a
code's embedding, p patch.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models import codebook, losses
from dalle_jax.models.context import Context
from dalle_jax.models.layers import init_module, module_axes
from dalle_jax.models.resnet import Conv, Decoder, Encoder
from dalle_jax.models.schedules import half_cosine

EPS = 0.1  # app. A.3: keeps pixels away from 0 and 1, where the logit-Laplace density explodes


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and loss of a dVAE; the defaults are the paper's.

    Attributes:
      image_size: S, pixels.
      vocab: K.
      hidden: width of the finest group; group g (from 0) is hidden * 2**g wide.
      widths: widths of the groups, finest first, instead of hidden's.
      n_init: channels with which the decoder's first group starts; without a bottleneck they are
        n, the embedding of a code.
      groups: number of resolutions; each but the first halves the grid.
      blocks_per_group: residual blocks in each group, or one number per group, finest first.
      patch: p. 1: a 7x7 convolution of pixels. Above: squares of p x p pixels enter and leave by
        1x1 convolutions, so that no layer runs at full resolution.
      bottleneck: n: the encoder ends in a tanh latent of n channels before the logits, and a
        code's embedding has these n channels too; 0: no such latent.
      likelihood: 'logit_laplace': 6 output maps, 3 mu and 3 ln b. 'mse': 3 maps, the image in
        [-1, 1], and mse_scale * squared error of the image in [0, 1]: a Gaussian's -ln density
        without its constant.
      mse_scale: 1 / (2 variance) of that Gaussian.
      warmup_steps: updates as an autoencoder: Gaussian noise is added to the latent of the
        bottleneck and the codes are not used. The schedules below start after them.
      noise: standard deviation of that noise, risen from 0 over the first half. Match the error
        that codes will make: 0.12 to 0.15 for 512 codes and 8 channels.
      kl_weight, kl_steps: beta rises from 0 to kl_weight over kl_steps updates.
      temperature, temperature_steps: tau falls from 1 to temperature over temperature_steps.
      post_gain: factor of every residual branch; None: 1 / blocks^2.
      codebook_init: 'none'; or 'kmeans': `prepare` puts the codes on the latents of real images.
      codebook_sharpness: how much logit `prepare` takes from a code for lying one mean squared
        error further from the latent than another.

    Raises:
      ValueError: on sizes that do not fit together and on unknown names.
    """

    image_size: int = 256
    vocab: int = 8192
    hidden: int = 256
    widths: tuple[int, ...] = ()
    n_init: int = 128
    groups: int = 4
    blocks_per_group: int | tuple[int, ...] = 2
    patch: int = 1
    bottleneck: int = 0
    likelihood: str = 'logit_laplace'
    mse_scale: float = 100.0
    warmup_steps: int = 0
    noise: float = 0.14
    kl_weight: float = 6.6
    kl_steps: int = 5_000
    temperature: float = 1 / 16
    temperature_steps: int = 150_000
    post_gain: float | None = None
    codebook_init: str = 'none'
    codebook_sharpness: float = 4.0

    def __post_init__(self):
        # A config read back from JSON has lists; only tuples keep the dataclass hashable.
        object.__setattr__(self, 'widths', tuple(self.widths))
        if not isinstance(self.blocks_per_group, int):
            object.__setattr__(self, 'blocks_per_group', tuple(self.blocks_per_group))

        def require(holds, name, rule):
            if not holds:
                raise ValueError(f'dvae: {name}={getattr(self, name)!r}: {rule}')

        for name, options in (('likelihood', ('logit_laplace', 'mse')),
                              ('codebook_init', ('none', 'kmeans'))):
            require(getattr(self, name) in options, name, f'choose one of {options}')
        for name in ('image_size', 'vocab', 'hidden', 'n_init', 'groups', 'patch'):
            require(getattr(self, name) >= 1, name, 'must be at least 1')
        for name in ('mse_scale', 'codebook_sharpness'):
            require(getattr(self, name) > 0, name, 'must be positive')
        for name in ('bottleneck', 'noise', 'kl_weight', 'warmup_steps', 'kl_steps',
                     'temperature_steps'):
            require(getattr(self, name) >= 0, name, 'must not be negative')
        require(0 < self.temperature <= 1, 'temperature', 'must be in (0, 1]')
        per_group = f'give one number per group, finest first; groups={self.groups}'
        require(len(self.widths) in (0, self.groups), 'widths', per_group)
        require(len(self.group_blocks) == self.groups, 'blocks_per_group', per_group)
        require(min(self.group_blocks) >= 1, 'blocks_per_group', 'a group needs a block')
        require(all(width >= 4 and width % 4 == 0 for width in self.group_widths),
                'widths' if self.widths else 'hidden',
                'widths must be multiples of 4: the inside of a block is a quarter as wide')
        require(self.image_size % self.factor == 0, 'image_size',
                f'not divisible by the downsampling factor {self.factor} = patch {self.patch} * '
                '2**(groups-1); change image_size, patch or groups')
        for name, asked in (('warmup_steps', self.warmup_steps > 0),
                            ('codebook_init', self.codebook_init == 'kmeans')):
            require(self.bottleneck or not asked, name,
                    'works on the latent of a bottleneck; set bottleneck, for instance to 8')

    @property
    def factor(self) -> int:
        """Pixels along a side of the square that one code stands for."""
        return self.patch * 2 ** (self.groups - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of an image, (rows, columns)."""
        return self.image_size // self.factor, self.image_size // self.factor

    @property
    def values_per_position(self) -> int:
        """Pixel values that one code stands for; 192 in the paper."""
        return 3 * self.factor ** 2

    @property
    def group_widths(self) -> tuple[int, ...]:
        return self.widths or tuple(self.hidden * 2 ** g for g in range(self.groups))

    @property
    def group_blocks(self) -> tuple[int, ...]:
        blocks = self.blocks_per_group
        return (blocks,) * self.groups if isinstance(blocks, int) else blocks

    @property
    def gain(self) -> float:
        return 1 / sum(self.group_blocks) ** 2 if self.post_gain is None else self.post_gain

    @property
    def embedding(self) -> int:
        """n, channels of a code's embedding."""
        return self.bottleneck or self.n_init


PRESETS = {
    'paper': Config(),
    'medium': Config(hidden=128),
    'small': Config(hidden=128, vocab=2048),
    'tiny': Config(hidden=64, vocab=512),
}


def _encoder(config: Config, dtype: Any = jnp.float32) -> Encoder:
    return Encoder(config.vocab, config.group_widths, config.group_blocks, config.gain,
                   config.patch, config.bottleneck, dtype)


def _decoder(config: Config, dtype: Any = jnp.float32) -> Decoder:
    return Decoder(6 if config.likelihood == 'logit_laplace' else 3, config.group_widths[::-1],
                   config.group_blocks[::-1], config.gain, config.patch,
                   config.n_init if config.bottleneck else 0, dtype)


def _codebook(config: Config) -> Conv:
    """Weights of the codes [B, h, w, K] -> mean embedding [B, h, w, n], float32.

    The 1x1 convolution with which the paper's decoder starts: kernel row k plus bias is code k.
    """
    return Conv(config.embedding, 1, axes=('vocab', None))


def _parts(config: Config) -> dict[str, tuple[nn.Module, jax.ShapeDtypeStruct]]:
    """The three modules and what each is called with for one code."""
    def shape(side, channels):
        return jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)

    return {'encoder': (_encoder(config), shape(config.factor, 3)),
            'codebook': (_codebook(config), shape(1, config.vocab)),
            'decoder': (_decoder(config), shape(1, config.embedding))}


def init(config: Config, key: jax.Array) -> tuple[Any, dict]:
    """Parameters {'encoder', 'codebook', 'decoder'} of float32 arrays, and no model state."""
    keys = jax.random.split(key, 3)
    return {name: init_module(module, k, shape)
            for k, (name, (module, shape)) in zip(keys, _parts(config).items())}, {}


def axes(config: Config) -> Any:
    """Logical axes: 'conv_in' and 'conv_out' for the networks' channels, 'vocab' for the codes;
    None for kernel windows and for channels too few to divide (colours, bottleneck, embedding).
    """
    return {name: module_axes(module, shape) for name, (module, shape) in _parts(config).items()}


def batch_spec(config: Config, frozen: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """One example: the image. Other sides that the factor divides work as well (windows)."""
    del frozen
    return {'image': jax.ShapeDtypeStruct((config.image_size, config.image_size, 3), jnp.uint8)}


def flops(config: Config, parts: Iterable[str] = ('encoder', 'codebook', 'decoder')) -> int:
    """Model FLOPs of one image, forward: of the convolutions of all three parts, or of some."""
    chosen = [_parts(config)[part] for part in parts]
    return math.prod(config.grid) * sum(
        module.flops(math.prod(one.shape[:3]), one.shape[3]) for module, one in chosen)


def map_pixels(images: jax.Array) -> jax.Array:
    """phi: uint8 in [0, 255] -> float32 in [0.1, 0.9] (app. A.3)."""
    return images.astype(jnp.float32) * ((1 - 2 * EPS) / 255) + EPS


def unmap_pixels(x: jax.Array) -> jax.Array:
    """Inverse of map_pixels onto [0, 1], clipped."""
    return jnp.clip((x - EPS) / (1 - 2 * EPS), 0.0, 1.0)


def read_out(maps: jax.Array, config: Config) -> jax.Array:
    """The decoder's maps [..., 6 or 3] as images [..., 3] in [0, 1]; ln b plays no part."""
    if config.likelihood == 'mse':
        return jnp.clip(0.5 + 0.5 * maps, 0.0, 1.0)
    return unmap_pixels(jax.nn.sigmoid(maps[..., :3]))


def _encode(params, config, images, dtype):
    """Latent and logits of uint8 images."""
    height, width = images.shape[1:3]
    if height % config.factor or width % config.factor:
        raise ValueError(f'dvae: images of {height}x{width} are not divisible by the downsampling '
                         f'factor {config.factor}; crop or resize them')
    return _encoder(config, dtype).apply({'params': params['encoder']}, map_pixels(images))


def decode_embedded(params: Any, config: Config, embedded: jax.Array, dtype: Any) -> jax.Array:
    """Maps [B, S, S, 6 or 3], for `read_out`, of embedded codes [B, h, w, n]."""
    return _decoder(config, dtype).apply({'params': params['decoder']}, embedded)


def lookup(params: Any, ids: jax.Array) -> jax.Array:
    """Embeddings [B, h, w, n] of codes [B, h, w]: the product with one-hot codes, as rows."""
    kernel, bias = params['codebook']['kernel'], params['codebook']['bias']
    return kernel[0, 0][ids] + bias[None, None, None]


def encode(params: Any, config: Config, images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Most probable codes, int32 [B, h, w], of uint8 images [B, S, S, 3].

    No sampling (sec. 2.2). Raises ValueError where the factor does not divide the sides. Codes of
    near ties depend on `dtype`: use one for a whole data set.
    """
    return jnp.argmax(_encode(params, config, images, dtype)[1], axis=-1).astype(jnp.int32)


def decode(params: Any, config: Config, ids: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Images, float32 [B, S, S, 3] in [0, 1], of codes [B, h, w]."""
    return read_out(decode_embedded(params, config, lookup(params, ids), dtype), config)


def _nll(maps, images, config):
    """-ln likelihood of every pixel value, [B, S, S, 3]."""
    if config.likelihood == 'mse':
        return config.mse_scale * (0.5 + 0.5 * maps - images.astype(jnp.float32) / 255) ** 2
    return losses.logit_laplace(map_pixels(images), maps[..., :3], maps[..., 3:])


def _quality(maps, images, config, suffix=''):
    """Mean squared error in [0, 1] per value, and dB averaged over images."""
    error = (read_out(maps, config) - images.astype(jnp.float32) / 255) ** 2
    decibels = -10 * jnp.log10(jnp.maximum(error.mean(axis=(1, 2, 3)), 1e-10))
    return {'mse' + suffix: (error.sum(), float(error.size)),
            'psnr' + suffix: (decibels.sum(), float(len(decibels)))}


def loss(params: Any, model_state: Any, batch: Any, ctx: Context) -> tuple[Any, Any, Any]:
    """The relaxed bound on a batch {'image': uint8 [B, S, S, 3]}.

    objective = mean over pixel values of -ln p(x|z) + beta / (3 f^2) * mean over positions of KL:
    both joint terms of an image divided by its number of values (app. A.2; beta / 192 in the
    paper). z is the Gumbel-softmax sample; the KL is that of the plain logits to the uniform prior.

    Metrics, beside mse and psnr of the relaxed reconstruction, temperature, beta, and
    codebook.usage of the most probable codes:
      elb_relaxed: lower bound with beta = 1, -(nll + KL / (3 f^2)), nats per pixel value.
      elb_hard: the same with the codes that this noise samples: an estimate of the bound of the
        discrete model. Annealing has gone far enough when both agree (sec. 2.1).
      mse_hard, psnr_hard: of the most probable codes, which is what a second stage sees.
    The last three cost two more decodings and exist only where ctx.train is False. The elbs are of
    the mapped pixels, and for likelihood 'mse' lack the Gaussian's constant.

    Without ctx.key the noise is left out. Raises ValueError for that in training, and for images
    that the factor does not divide.
    """
    config, images = ctx.config, batch['image']
    if ctx.train and ctx.key is None:
        raise ValueError('dvae: training draws noise and ctx.key is None; give a key')
    images = ctx.constrain(images, ('batch', None, None, None))
    latent, logits = _encode(params, config, images, ctx.dtype)
    step = ctx.step - config.warmup_steps
    tau = half_cosine(step, 1.0, config.temperature, config.temperature_steps)
    beta = half_cosine(step, 0.0, config.kl_weight, config.kl_steps)
    relaxed = codebook.gumbel_softmax(logits, tau, ctx.key)
    embedded = _codebook(config).apply({'params': params['codebook']}, relaxed)
    if config.warmup_steps:
        noisy = latent
        if ctx.key is not None:
            sd = half_cosine(ctx.step, 0.0, config.noise, config.warmup_steps // 2)
            noisy += sd * jax.random.normal(jax.random.fold_in(ctx.key, 1), latent.shape)
        embedded = jnp.where(step < 0, noisy, embedded)
    maps = decode_embedded(params, config, embedded, ctx.dtype)
    nll, kl = _nll(maps, images, config), losses.kl_to_uniform(logits)
    terms = {
        'reconstruction': losses.Term(nll.sum(), float(nll.size)),
        'kl': losses.Term(kl.sum(), float(kl.size), beta / config.values_per_position)}
    ids = jnp.argmax(logits, axis=-1)
    metrics = {
        'elb_relaxed': (-nll.sum() - kl.sum(), float(nll.size)),
        'temperature': (tau, 1.0), 'beta': (beta, 1.0)}
    metrics |= _quality(maps, images, config) | codebook.usage(ids, config.vocab)
    if config.warmup_steps:  # codes that are not in use yet cannot collapse
        alarm, count = metrics['alarm/codebook_collapse']
        metrics['alarm/codebook_collapse'] = jnp.where(step < 0, 0.0, alarm), count
    if not ctx.train:
        drawn = lookup(params, jnp.argmax(relaxed, axis=-1))
        hard = _nll(decode_embedded(params, config, drawn, ctx.dtype), images, config)
        metrics['elb_hard'] = -hard.sum() - kl.sum(), float(hard.size)
        maps = decode_embedded(params, config, lookup(params, ids), ctx.dtype)
        metrics |= _quality(maps, images, config, '_hard')
    return terms, metrics, model_state


def snapshot(params: Any, model_state: Any, batch: Any, ctx: Context) -> dict[str, jax.Array]:
    """Originals, their reconstructions through the argmax codes, and how often each code is used.
    During the warm-up the reconstructions pass the latent itself.
    """
    del model_state
    config, images = ctx.config, batch['image']
    latent, logits = _encode(params, config, images, ctx.dtype)
    ids = jnp.argmax(logits, axis=-1)
    embedded = lookup(params, ids)
    if config.warmup_steps:
        embedded = jnp.where(ctx.step < config.warmup_steps, latent, embedded)
    maps = decode_embedded(params, config, embedded, ctx.dtype)
    return {'images/originals': images, 'images/reconstructions': read_out(maps, config),
            'counts/codes': jnp.bincount(ids.reshape(-1), length=config.vocab)}


def prepare_step(config: Config) -> int | None:
    """The update before which `prepare` is due; None: never."""
    return config.warmup_steps if config.codebook_init == 'kmeans' else None


def prepare(params: Any, config: Config, batches: Iterable[Any],
            key: jax.Array) -> tuple[Any, dict[str, float]]:
    """Puts the codes on the latents of real images.

    Embeddings become the centres of a k-means of the latents, and the logits fall with the squared
    distance to them, so that argmax is the nearest centre; see codebook_sharpness.

    Args:
      params: best trained as an autoencoder (warmup_steps) before.
      config: the model's.
      batches: of {'image': uint8 [B, S, S, 3]}; codebook.gather reads as many as it needs. Every
        process of a run must pass the same ones.
      key: PRNG key.

    Returns:
      New parameters, and numbers to log.

    Raises:
      ValueError: with fewer informative squares of pixels than codes.
    """
    latents = jax.jit(lambda p, x: _encode(p, config, x, jnp.float32)[0])
    points = codebook.gather((np.asarray(batch['image']) for batch in batches),
                             lambda images: latents(params, images), config.factor, config.vocab)
    clusters = codebook.kmeans(points, config.vocab, key)
    # Where the centres are the points themselves, s would be infinite and argmax frozen.
    distance = jnp.maximum(clusters.distortion[-1], 1e-3 * points.var(axis=0).sum() + 1e-6)
    sharpness = config.codebook_sharpness / distance
    kernel, bias = codebook.distance_logits(clusters.centres, sharpness)
    parts = {'encoder': params['encoder'] | {
                 'logits': {'kernel': kernel[None, None], 'bias': bias}},
             'codebook': {'kernel': clusters.centres[None, None],
                          'bias': jnp.zeros(config.bottleneck)}}
    report = {'points': len(points), 'distortion_of_seeds': clusters.distortion[0],
              'distortion': clusters.distortion[-1], 'sharpness': sharpness}
    return params | parts, {f'kmeans/{name}': float(value) for name, value in report.items()}
