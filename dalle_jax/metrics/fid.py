"""FID, IS and KID: distances between distributions of images, from features of any network.

    FID  Heusel et al. 2017: the Frechet distance of two Gaussians with the features' moments
    IS   Salimans et al. 2016: how certain and how varied a classifier finds images
    KID  Binkowski et al. 2018: the squared maximum mean discrepancy with a cubic kernel

Computed on the host in float64, but for products within KID. N images, D features, C classes.
"""

import functools
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROWS_AT_ONCE = 8192  # of features in float64


class Moments(NamedTuple):
    """Of features, so that those of parts make those of all: see `merge`.

    Attributes:
      count: N.
      mean: float64 [D].
      scatter: float64 [D, D], the sum over images of outer products of deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray


class Gaussian(NamedTuple):
    """Mean, float64 [D], and covariance, float64 [D, D]: mu and sigma of statistics files."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Moments of features [N, D]. Parts of thousands of rows are fastest, see `merge`.

    Raises:
      ValueError: no images, another shape, or values that are not finite.
    """
    features = _checked(features)
    parts = (features[i:i + ROWS_AT_ONCE] for i in range(0, len(features), ROWS_AT_ONCE))
    return functools.reduce(merge, map(_part, parts))


def _part(features):
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    features -= mean
    return Moments(len(features), mean, features.T @ features)  # half a product: BLAS' syrk


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the images of both (Chan et al. 1979, exact)."""
    _check_sizes(a.mean, b.mean)
    count, change = a.count + b.count, b.mean - a.mean
    between = np.outer(change * (a.count * b.count / count), change)
    between += a.scatter
    between += b.scatter
    return Moments(count, a.mean + change * (b.count / count), between)


def gaussian(found: Moments) -> Gaussian:
    """Mean and unbiased covariance.

    Raises:
      ValueError: too few images, or all features constant.
    """
    size = len(found.mean)
    if found.count <= size:
        raise ValueError(
            f'FID with {size} features needs at least {size + 1} images, and there are '
            f'{found.count}: the covariance of fewer has no full rank, and the distance says more '
            'about their number than about them. Take more images, or features of a lower layer')
    # Not exactly 0: a mean of equal values is rounded.
    if (np.diagonal(found.scatter) <= found.count * (1e-12 * found.mean) ** 2).all():
        raise ValueError(f'all {found.count} images have the same features; the images or the '
                         'weights of the network are wrong')
    return Gaussian(found.mean, found.scatter / (found.count - 1))


def read_gaussian(path: str | Path) -> Gaussian:
    """A statistics file of pytorch-fid: npz with mu [D] and sigma [D, D].

    Raises:
      ValueError: something else; names the file.
    """
    stored = np.load(path) if zipfile.is_zipfile(path) else {}
    if not {'mu', 'sigma'} <= set(stored):
        raise ValueError(f'{path}: there is no statistics file, which is an npz with mu and sigma')
    try:
        mean, covariance = (stored[name].astype(np.float64) for name in ('mu', 'sigma'))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(f'{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} are '
                         'not [D] and [D, D]')
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise ValueError(f'{path} has values that are not finite')
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * covariance.max()):
        raise ValueError(f'{path}: sigma is not symmetric, so it is no covariance')
    return Gaussian(mean, covariance)


def write_gaussian(path: str | Path, found: Gaussian) -> None:
    """Writes a file as `read_gaussian` and pytorch-fid read it; replaces another one at once."""
    part = Path(f'{path}.part')
    with open(part, 'wb') as file:
        np.savez_compressed(file, mu=found.mean, sigma=found.covariance)
    os.replace(part, path)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """FID: |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of covariances A and B.

    With A = R R', the eigenvalues of A B are those of the symmetric R' B R, which are not negative:
    the root of the product, with its imaginary parts, is never taken.

    Raises:
      ValueError: features of different sizes.
    """
    _check_sizes(a.mean, b.mean)
    # Features that are constant in A add nothing, and A without them mostly has full rank.
    varied = np.ix_(*[np.diagonal(a.covariance) > 0] * 2)
    root = _root(a.covariance[varied])
    eigenvalues = np.linalg.eigvalsh(root.T @ b.covariance[varied] @ root)
    change = a.mean - b.mean
    distance = (change @ change + np.trace(a.covariance) + np.trace(b.covariance)
                - 2 * np.sqrt(eigenvalues.clip(min=0)).sum())
    return max(0.0, float(distance))


def _root(covariance):
    """R with covariance = R R'."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # singular; this takes several times as long
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(values.clip(min=0))


def inception_score(logits: np.ndarray, splits: int = 10, seed: int | None = None
                    ) -> tuple[float, float]:
    """IS: exp of the mean divergence of an image's classes from those of all, over parts.

    Args:
      logits: [N, C]; of Inception the unbiased ones, with all 1008 columns, by convention.
        Logarithms of probabilities are logits, too.
      splits: parts of the images, one behind the other, of sizes as equal as can be.
      seed: of the order of images; 2020 is torch-fidelity's. None: as they come, as the authors do.

    Returns:
      Mean and standard deviation over the parts.

    Raises:
      ValueError: fewer images than parts, logits that are nan or inf, or -inf for all classes.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size or not np.isfinite(logits.max(axis=1)).all():
        raise ValueError(f'logits {list(logits.shape)} must be [N, C], none of them nan or inf, '
                         'and of each image some above -inf')
    count = len(logits)
    if not 0 < splits <= count:
        raise ValueError(f'IS over {splits} parts needs at least as many images, and there are '
                         f'{count}; give fewer splits')
    order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    scores = [_score(logits[order[i * count // splits:(i + 1) * count // splits]])
              for i in range(splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits):
    """exp of the entropy of the mean minus the mean entropy."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits = np.maximum(logits, -1e4)  # exp is 0 there already, and 0 times inf is avoided
    chances = np.exp(logits)
    totals = chances.sum(axis=1)
    chances /= totals[:, None]
    negative = np.mean(np.einsum('nc,nc->n', chances, logits) - np.log(totals))
    mean = chances.mean(axis=0)
    mean = mean[mean > 0]
    return np.exp(negative - mean @ np.log(mean))


def kernel_distance(features: np.ndarray, others: np.ndarray, subsets: int = 100,
                    size: int = 1000, seed: int = 2020) -> tuple[float, float]:
    """KID: unbiased squared discrepancy with the kernel (x y / D + 1)^3, over random subsets.

    Args:
      features, others: [N, D] and [M, D].
      subsets, size: how many subsets of how many images of each; those of torch-fidelity.
      seed: of the subsets, which are then torch-fidelity's.

    Returns:
      Mean and standard deviation over the subsets. The mean is unbiased, and may be negative.

    Raises:
      ValueError: fewer images than `size`, features of different sizes or not finite.
    """
    features, others = _checked(features), _checked(others)
    _check_sizes(features[0], others[0])
    fewer = min(len(features), len(others))
    if not 2 <= size <= fewer or subsets < 1:
        raise ValueError(f'KID over {subsets} subsets of {size} images: give at least one subset, '
                         f'of 2 to {fewer} images, which is how many there are')
    centre = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    sets = [_centred(array, centre) for array in (features, others)]
    rng, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (points.chosen(rng.choice(len(points.rest), size, replace=False))
                for points in sets)
        alike = _kernels(x, x, diagonal=False) + _kernels(y, y, diagonal=False)
        found.append(alike / (size * (size - 1)) - 2 * _kernels(x, y) / size**2)
    return float(np.mean(found)), float(np.std(found))


class _Points(NamedTuple):
    """Features x as x - c [N, D] and, float64 [N], (x - c / 2) c / D + 1 / 2.

    So x y / D + 1 is (x - c)(y - c) / D plus the other parts of both. Products of what is centred
    are small, which float32 suffices for: in half the time, with errors that average out. Those of
    products of the features themselves do not.
    """

    rest: np.ndarray
    shift: np.ndarray

    def chosen(self, rows):
        return _Points(self.rest[rows], self.shift[rows])


def _centred(features, centre):
    rest = features - centre
    along = np.einsum('nd,d->n', rest, centre, dtype=np.float64)
    square = np.einsum('d,d->', centre, centre, dtype=np.float64)
    return _Points(rest, (along + square / 2) / len(centre) + 0.5)


def _kernels(x, y, diagonal=True):
    """The sum of the kernels of all pairs; without those of a point and itself."""
    base = np.multiply(x.rest @ y.rest.T, 1 / x.rest.shape[1], dtype=np.float64)
    base += x.shift[:, None]
    base += y.shift
    total = np.vdot(base * base, base)  # a power takes longer than the product of the matrices
    return total if diagonal else total - (base.diagonal() ** 3).sum()


def _checked(features):
    features = np.asarray(features)
    if features.ndim != 2 or not features.size:
        raise ValueError(f'features {list(features.shape)} must be [N, D], of at least one image')
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(f'features of {np.sum(~finite)} of {len(finite)} images, first of image '
                         f'{np.argmin(finite)}, are not finite; these images or the weights of the '
                         'network are broken')
    return features


def _check_sizes(a, b):
    if len(a) != len(b):
        raise ValueError(f'{len(a)} and {len(b)} features cannot be compared: both must come from '
                         'the same layer of the same network')
