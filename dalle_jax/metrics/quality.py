"""How good and how varied images are, beside real ones: FID, IS and KID after any blur.

A set of images goes once through a network, whose features and logits become a Measured; those of
two sets become numbers. Which network it is, is the caller's business.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.metrics import fid
from dalle_jax.metrics.blur import blur

ROWS = 4096  # of features that become moments at once


class Measured(NamedTuple):
    """What remains of a set of images.

    Attributes:
      count: images.
      gaussian: moments of their features.
      inception_score: mean and standard deviation over parts, or None without logits.
      features: float32 [N, D], where they are wanted for KID, or None.
    """

    count: int
    gaussian: fid.Gaussian
    inception_score: tuple[float, float] | None
    features: np.ndarray | None


def measure(network: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
            parts: Iterable[np.ndarray], radius: float, splits: int, keep: bool = False
            ) -> Measured:
    """Looks at images after a blur.

    Args:
      network: uint8 images [B, H, W, 3] -> features float32 [B, D], logits float32 [B, C].
      parts: the images, some at a time.
      radius: of the blur, in pixels.
      splits: parts of the Inception Score.
      keep: the features, for KID.

    Raises:
      ValueError: too few images for their moments, features that are not finite.
    """
    moments, waiting, kept, logits = None, [], [], []
    for part in parts:
        features, classes = network(blur(part, radius))
        logits.append(classes)
        waiting.append(features)
        if keep:
            kept.append(features)
        if sum(map(len, waiting)) >= ROWS:
            moments, waiting = _add(moments, waiting), []
    if waiting:
        moments = _add(moments, waiting)
    if moments is None:
        raise ValueError('there are no images to measure')
    score = fid.inception_score(np.concatenate(logits), splits)
    return Measured(moments.count, fid.gaussian(moments), score,
                    np.concatenate(kept) if keep else None)


def _add(moments, waiting):
    new = fid.moments(np.concatenate(waiting))
    return new if moments is None else fid.merge(moments, new)


def compare(found: Measured, real: Measured, subsets: int, size: int) -> dict[str, Any]:
    """FID, IS, and KID where both have features, as values for JSON.

    Args:
      subsets, size: of KID; `size` is lowered to the number of images there are.
    """
    values = {'images': found.count, 'fid': fid.frechet_distance(found.gaussian, real.gaussian)}
    if found.inception_score:
        values |= dict(zip(('inception_score', 'inception_score_std'), found.inception_score))
    if found.features is not None and real.features is not None:
        size = min(size, found.count, real.count)
        kid = fid.kernel_distance(found.features, real.features, subsets, size)
        values |= dict(zip(('kid', 'kid_std'), kid), kid_subset=size)
    return values


def read(path: Path) -> Measured:
    """What `write` wrote, or a statistics file of pytorch-fid, which has moments only."""
    gaussian = fid.read_gaussian(path)
    with np.load(path) as stored:
        score = tuple(stored['inception_score'].tolist()) if 'inception_score' in stored else None
        features = stored['features'] if 'features' in stored else None
        return Measured(int(stored.get('count', 0)), gaussian, score, features)


def write(arrays: Callable[[Path, Mapping[str, Any]], None], path: Path, found: Measured) -> None:
    """Writes it so that pytorch-fid, too, can read the moments.

    Args:
      arrays: writes a file of arrays at once, such as runs.write_arrays.
    """
    values = {'count': found.count, 'mu': found.gaussian.mean, 'sigma': found.gaussian.covariance,
              'inception_score': found.inception_score, 'features': found.features}
    arrays(path, {name: value for name, value in values.items() if value is not None})
