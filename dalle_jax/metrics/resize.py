"""Images as Inception sees them: three ways to bring them to 299 x 299 pixels, by name.

FID depends on them by whole points, so two values can be compared only where the way is the same:

    'tensorflow'  bilinear without half-pixel centres and without antialiasing, as in TensorFlow 1:
                  the FID and IS of their authors, torch-fidelity; then (x - 128) / 128
    'pytorch'     bilinear with half-pixel centres, without antialiasing, of x / 255: pytorch-fid;
                  then 2 x - 1
    'clean'       bicubic with antialiasing (Pillow) of every channel in float32, not rounded, cut
                  off at 0 and 255: clean-fid (Parmar et al. 2022); then (x - 128) / 128

x is 0 to 255. The first two run on the device, the last on the host.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299
RESIZES = ('tensorflow', 'pytorch', 'clean')


def resize(images: Any, how: str, size: int = SIZE) -> Any:
    """uint8 [B, H, W, 3] -> float32 [B, size, size, 3] in [-1, 1], by one of RESIZES.

    Of 'clean' images and result are numpy arrays, of the others jax arrays.
    """
    match how:
        case 'tensorflow':
            return (_bilinear(images.astype(jnp.float32), size, False) - 128) / 128
        case 'pytorch':
            return 2 * _bilinear(images.astype(jnp.float32) / 255, size, True) - 1
        case 'clean':
            return (np.stack([_bicubic(image, size) for image in images]) - 128) / 128
    raise ValueError(f'resize {how!r} is none of {", ".join(RESIZES)}')


def _bilinear(x: jax.Array, size: int, half_pixel: bool) -> jax.Array:
    for axis in (2, 1):
        low, high, weight = _neighbours(x.shape[axis], size, half_pixel)
        weight = weight.reshape((1, size, 1, 1) if axis == 1 else (1, 1, size, 1))
        below = jnp.take(x, low, axis)
        x = below + (jnp.take(x, high, axis) - below) * weight
    return x


def _neighbours(extent: int, size: int, half_pixel: bool) -> tuple[np.ndarray, ...]:
    """Of each of `size` pixels the two among `extent` it lies between, and the second's weight.

    In float32 like the originals: exact positions would differ where a weight is nearly 0 or 1.
    """
    scale = np.float32(extent) / np.float32(size)
    where = np.arange(size, dtype=np.float32)
    if half_pixel:
        half = np.float32(0.5)
        where = np.maximum((where + half) * scale - half, np.float32(0))
    else:
        where = where * scale
    low = where.astype(np.int32)
    return low, np.minimum(low + 1, extent - 1), where - low.astype(np.float32)


def _bicubic(image: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    channels = [Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC)
                for channel in np.moveaxis(image.astype(np.float32), -1, 0)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)
