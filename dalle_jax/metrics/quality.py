"""How good and how varied images are, beside real ones: FID, IS and KID after any blur.

A set of images goes once through a network for every blur; features and logits become a Measured,
and those of two sets become numbers. Which network it is, is the caller's business.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
            parts: Iterable[np.ndarray], radii: Sequence[float], splits: int, keep: bool = False
            ) -> dict[float, Measured]:
    """Looks at images once, after each of several blurs.

    Args:
      network: uint8 images [B, H, W, 3] -> features float32 [B, D], logits float32 [B, C].
      parts: the images, some at a time.
      radii: of the blurs, in pixels.
      splits: parts of the Inception Score, into which images are divided at random (always alike).
      keep: the features of images that are not blurred, for KID.

    Returns:
      radius -> what remains.

    Raises:
      ValueError: too few images for their moments, features that are not finite.
    """
    looks = {radius: _Look() for radius in radii}
    for part in parts:
        for radius, look in looks.items():
            look.add(*network(blur(part, radius)), keep and not radius)
    return {radius: look.measured(splits) for radius, look in looks.items()}


class _Look:
    """What is known of images so far."""

    def __init__(self):
        self._moments, self._waiting, self._kept, self._logits = None, [], [], []

    def add(self, features, logits, keep):
        self._logits.append(logits)
        self._waiting.append(features)
        if keep:
            self._kept.append(features)
        if sum(map(len, self._waiting)) >= ROWS:
            self._merge()

    def _merge(self):
        new = fid.moments(np.concatenate(self._waiting))
        self._moments = fid.merge(self._moments, new) if self._moments else new
        self._waiting = []

    def measured(self, splits):
        if self._waiting:
            self._merge()
        if not self._moments:
            raise ValueError('there are no images to measure')
        # In another order: images may be sorted, as by the species of birds.
        score = fid.inception_score(np.concatenate(self._logits), splits, seed=2020)
        return Measured(self._moments.count, fid.gaussian(self._moments), score,
                        np.concatenate(self._kept) if self._kept else None)


def named(key: str, network: str) -> str:
    """What results call a number: of Inception FID is `fid`, of another network `fid_NETWORK`, so
    that none is mistaken."""
    return key if network == 'inception' else f'{key}_{network}'


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
        if size == found.count == real.count:
            subsets = 1  # they would all be the same
        kid, deviation = fid.kernel_distance(found.features, real.features, subsets, size)
        values |= {'kid': kid, 'kid_subset': size} | ({'kid_std': deviation} if subsets > 1 else {})
    return values


def read(path: Path) -> Measured:
    """What `write` wrote, or a statistics file of pytorch-fid, which has moments only."""
    gaussian = fid.read_gaussian(path)
    with np.load(path) as stored:
        score = tuple(stored['inception_score'].tolist()) if 'inception_score' in stored else None
        features = stored['features'] if 'features' in stored else None
        return Measured(int(stored.get('count', 0)), gaussian, score, features)


def about(path: Path) -> dict[str, Any]:
    """What `write` was told of the statistics in a file; {} of other statistics files."""
    with np.load(path) as stored:
        return json.loads(str(stored['about'])) if 'about' in stored else {}


def write(arrays: Callable[[Path, Mapping[str, Any]], None], path: Path, found: Measured,
          about: Mapping[str, Any]) -> None:
    """Writes it so that pytorch-fid, too, can read the moments.

    Args:
      arrays: writes a file of arrays at once, such as runs.write_arrays.
      about: of the network and the images, for JSON.
    """
    values = {'count': found.count, 'mu': found.gaussian.mean, 'sigma': found.gaussian.covariance,
              'inception_score': found.inception_score, 'features': found.features,
              'about': json.dumps(about)}
    arrays(path, {name: value for name, value in values.items() if value is not None})
