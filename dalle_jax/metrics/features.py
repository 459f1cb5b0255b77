"""Features of many images, in batches of one size; those of our own network of words."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dalle_jax.models import words
from dalle_jax.models.context import unconstrained


def in_batches(function: Callable[[np.ndarray], Mapping[str, jax.Array]], images: np.ndarray,
               batch: int) -> dict[str, np.ndarray]:
    """function of images, `batch` at a time, put together.

    Args:
      function: uint8 [batch, H, W, 3] -> name: array [batch, ...].
      images: uint8 [B, H, W, 3]; the last ones are padded to a whole batch, so that one program
        serves all.
      batch: images at once.

    Raises:
      ValueError: images of another type or shape, or none.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f'images are {images.dtype} {list(images.shape)}; give uint8 '
                         '[B, H, W, 3], at least one')
    found = []
    for start in range(0, len(images), batch):
        rows = images[np.minimum(np.arange(start, start + batch), len(images) - 1)]
        found.append(function(rows))
        # One batch late, so that the device is busy with the next one.
        found[-2:-1] = jax.device_get(found[-2:-1])
    found = jax.device_get(found)
    return {name: np.concatenate([part[name] for part in found])[:len(images)]
            for name in found[0]}


@functools.partial(jax.jit, static_argnames=('config', 'constrain'))
def _words(params, images, config, constrain):
    def embed(params, images):
        # Also where an accelerator would round the operands.
        with jax.default_matmul_precision('highest'):
            return words.embed(params, config, images)
    images = constrain(images, ('batch', None, None, None))
    return constrain.divide(embed, ('batch',), params)(images)


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of images by a trained models/words.py, in the place of inception.Features.

    Its figures are no FID, KID or IS as published, which are defined on Inception: say `fid_words`.

    Attributes:
      params, config: of the network; params are best where they are used: on the devices of a mesh,
        all of them.
      batch, constrain: as of inception.Features.

    Raises:
      ValueError: a batch that is not positive.
    """

    params: Any
    config: words.Config
    batch: int = 128
    constrain: Any = unconstrained

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f'batch={self.batch}: give at least 1')

    def of(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """'features' float32 [B, D] and 'logits' float32 [B, V] of images uint8 [B, S, S, 3].

        Raises:
          ValueError: images of another type, shape or size, or none.
        """
        return in_batches(lambda rows: _words(self.params, rows, self.config, self.constrain),
                          images, self.batch)
