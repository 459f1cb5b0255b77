"""Gaussian blur of images, by which Ramesh et al. 2021 (sec. 3.1) compare what a dVAE can draw.

A discrete VAE drops the finest detail, so FID and IS are also measured after real images and
samples alike have been blurred. The radius is the standard deviation in pixels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

REACH = 4.0  # in standard deviations; what is beyond weighs less than 1e-4


def blur(images: np.ndarray, radius: float) -> np.ndarray:
    """uint8 [B, H, W, 3] -> the same, blurred and rounded; images are mirrored at their borders.

    Raises:
      ValueError: a radius that is negative or so large that the mirror images do not reach.
    """
    if not radius:
        return images
    height, width = images.shape[1:3]
    return np.asarray(_blurred(images, matrix(height, radius), matrix(width, radius)))


@jax.jit
def _blurred(images, down, across):
    x = jnp.einsum('ih,bhwc->biwc', down, images.astype(jnp.float32),
                   precision=lax.Precision.HIGHEST)
    x = jnp.einsum('jw,biwc->bijc', across, x, precision=lax.Precision.HIGHEST)
    return jnp.round(x).clip(0, 255).astype(jnp.uint8)


@functools.lru_cache
def matrix(extent: int, radius: float) -> np.ndarray:
    """The blur of a row of `extent` pixels as a matrix, float32 [extent, extent]."""
    reach = int(REACH * radius + 0.5)
    if radius < 0 or reach > extent:
        raise ValueError(f'blur radius {radius} with images of {extent} pixels; give 0 to '
                         f'{(extent - 0.5) / REACH:.3g}')
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / radius) ** 2)
    weights /= weights.sum()
    found = np.zeros((extent, extent))
    for offset, weight in zip(offsets, weights):
        source = np.arange(extent) + offset
        source = np.where(source < 0, -1 - source, source)
        source = np.where(source >= extent, 2 * extent - 1 - source, source)
        found[np.arange(extent), source] += weight
    return found.astype(np.float32)
