"""Weights that need not be stored: a function of an array's name and shape."""

import math
import zlib

import numpy as np


def random_weights(name, shape):
    """float32, of a size that keeps activations near 1; gains of norms near 1."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 1, shape)
    if len(shape) == 4:
        values *= 1 / math.sqrt(math.prod(shape[1:]))
    elif len(shape) == 2:  # a codebook
        values *= 0.4
    else:
        values = 0.2 * values + ('norm' in name and name.endswith('weight'))
    return values.astype(np.float32)
