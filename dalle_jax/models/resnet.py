"""The dVAE's convolutional residual networks (Ramesh et al. 2021, app. A.1; the released code).

Images and activations are [B, H, W, C]. The residual stream, the layers around the codes and the
last one are float32; all other convolutions compute in `dtype`. p patch, K codes, n channels of a
code's embedding. `flops(pixels, inputs)` of a module counts the FLOPs of its convolutions for an
input of so many pixels and channels, a multiply-add as two, and padding too.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Conv(nn.Module):
    """Convolution of odd size with zero 'same' padding, computed in `dtype`.

    Weights start as Normal(0, 1 / sqrt(inputs)) without a factor for the relu, biases as zeros.
    """

    features: int
    size: int
    dtype: Any = jnp.float32
    axes: tuple[str | None, str | None] = ('conv_in', 'conv_out')

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
        kernel = self.param(
            'kernel', nn.with_logical_partitioning(normal, (None, None, *self.axes)),
            (self.size, self.size, x.shape[-1], self.features))
        bias = self.param(
            'bias', nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]),
            (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias[None, None, None]))
        if self.size == 1:  # XLA:CPU is up to 2.5 times faster at the gradient of a product
            return x @ kernel[0, 0] + bias
        return bias + jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    @nn.nowrap
    def flops(self, pixels: int, inputs: int) -> int:
        return 2 * pixels * self.size**2 * inputs * self.features


class Block(nn.Module):
    """Residual bottleneck: skip + gain * (relu, convolution) four times.

    Attributes:
      features: output channels; the three inner convolutions have a quarter.
      sizes: kernel sizes, (3, 3, 3, 1) in the encoder and mirrored in the decoder.
      gain: factor of the branch.
      dtype: of the convolutions; the sum is float32.
      double: repeat every pixel 2x2 first; needs sizes[0] == 1.
    """

    features: int
    sizes: tuple[int, int, int, int]
    gain: float
    dtype: Any
    double: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        skip = x
        if x.shape[-1] != self.features:
            skip = Conv(self.features, 1, self.dtype, name='id_path')(x).astype(jnp.float32)
        for i, size in enumerate(self.sizes, start=1):
            features = self.features if i == len(self.sizes) else self.features // 4
            x = Conv(features, size, self.dtype, name=f'conv_{i}')(nn.relu(x))
            if i == 1 and self.double:
                # Repetition commutes with relu and 1x1 convolutions: done after them, they cost a
                # quarter and the wide input is never written at the doubled resolution.
                x, skip = upsample(x), upsample(skip)
        return skip + self.gain * x.astype(jnp.float32)

    @nn.nowrap
    def flops(self, pixels: int, inputs: int) -> int:
        total = 0 if inputs == self.features else Conv(self.features, 1).flops(pixels, inputs)
        for i, size in enumerate(self.sizes, start=1):
            conv = Conv(self.features if i == len(self.sizes) else self.features // 4, size)
            total += conv.flops(pixels, inputs)
            pixels *= 4 if i == 1 and self.double else 1
            inputs = conv.features
        return total


class Encoder(nn.Module):
    """Mapped images [B, S, S, 3] -> latent [B, h, w, n or last width], logits [B, h, w, K].

    Attributes:
      vocab: K.
      widths, blocks: channels and number of blocks of each group, finest first.
      gain: of the residual branches.
      patch: p; 1 starts with a 7x7 convolution of pixels, more with a 1x1 one of p x p squares.
      bottleneck: n, channels of a tanh latent before the logits; 0 for none.
    """

    vocab: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    gain: float
    patch: int
    bottleneck: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = space_to_depth(x, self.patch)
        x = Conv(self.widths[0], 7 if self.patch == 1 else 1, self.dtype, (None, 'conv_out'),
                 name='input')(x).astype(jnp.float32)
        for g, (width, blocks) in enumerate(zip(self.widths, self.blocks)):
            if g > 0:
                x = max_pool(x)
            for b in range(blocks):
                x = Block(width, (3, 3, 3, 1), self.gain, self.dtype,
                          name=f'group_{g + 1}_block_{b + 1}')(x)
        x = nn.relu(x)
        if self.bottleneck:
            x = Conv(self.bottleneck, 1, axes=('conv_in', None), name='bottleneck')(x)
            x = jnp.tanh(x)
        inputs = None if self.bottleneck else 'conv_in'
        return x, Conv(self.vocab, 1, axes=(inputs, 'vocab'), name='logits')(x)

    @nn.nowrap
    def flops(self, pixels: int, inputs: int) -> int:
        pixels, inputs = pixels // self.patch**2, inputs * self.patch**2
        total = Conv(self.widths[0], 7 if self.patch == 1 else 1).flops(pixels, inputs)
        inputs = self.widths[0]
        for g, (width, blocks) in enumerate(zip(self.widths, self.blocks)):
            pixels //= 4 if g > 0 else 1
            for _ in range(blocks):
                total += Block(width, (3, 3, 3, 1), self.gain, self.dtype).flops(pixels, inputs)
                inputs = width
        if self.bottleneck:
            total += Conv(self.bottleneck, 1).flops(pixels, inputs)
            inputs = self.bottleneck
        return total + Conv(self.vocab, 1).flops(pixels, inputs)


class Decoder(nn.Module):
    """Embedded codes [B, h, w, n] -> maps [B, S, S, maps].

    The embedding itself, the paper's first 1x1 convolution, is not part of this module.

    Attributes:
      maps: output channels.
      widths, blocks: channels and number of blocks of each group, coarsest first.
      gain, patch: as in Encoder.
      n_init: channels to which a 1x1 convolution brings the embedding first; 0 for none.
    """

    maps: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    gain: float
    patch: int
    n_init: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.n_init:
            x = Conv(self.n_init, 1, self.dtype, (None, 'conv_out'), name='input')(x)
            x = x.astype(jnp.float32)
        for g, (width, blocks) in enumerate(zip(self.widths, self.blocks)):
            for b in range(blocks):
                x = Block(width, (1, 3, 3, 3), self.gain, self.dtype, double=g > 0 and b == 0,
                          name=f'group_{g + 1}_block_{b + 1}')(x)
        # float32, which the stream is in anyway: bfloat16 would round mu by up to a quarter of a
        # grey level, several per cent of a narrow distribution's width.
        x = Conv(self.maps * self.patch ** 2, 1, axes=('conv_in', None), name='output')(nn.relu(x))
        return depth_to_space(x, self.patch)

    @nn.nowrap
    def flops(self, pixels: int, inputs: int) -> int:
        total = 0
        if self.n_init:
            total, inputs = Conv(self.n_init, 1).flops(pixels, inputs), self.n_init
        for g, (width, blocks) in enumerate(zip(self.widths, self.blocks)):
            for b in range(blocks):
                block = Block(width, (1, 3, 3, 3), self.gain, self.dtype, double=g > 0 and b == 0)
                total += block.flops(pixels, inputs)
                pixels, inputs = pixels * (4 if block.double else 1), width
        return total + Conv(self.maps * self.patch**2, 1).flops(pixels, inputs)


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum of 2x2 squares: [B, H, W, C] -> [B, H/2, W/2, C].

    Of slices, whose gradient is elementwise: that of reduce_window costs four times as much on CPU.
    """
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


def upsample(x: jax.Array) -> jax.Array:
    """Each pixel twice in both directions: [B, H, W, C] -> [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def space_to_depth(x: jax.Array, p: int) -> jax.Array:
    """Squares of p x p pixels into channels: [B, H, W, C] -> [B, H/p, W/p, p p C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    return x.reshape(b, h // p, w // p, p * p * c)


def depth_to_space(x: jax.Array, p: int) -> jax.Array:
    """Inverse of space_to_depth: [B, h, w, p p C] -> [B, p h, p w, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, p, p, c // p ** 2).swapaxes(2, 3)
    return x.reshape(b, h * p, w * p, c // p ** 2)
