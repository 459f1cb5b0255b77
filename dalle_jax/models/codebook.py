"""The codes of a dVAE: how many are used, where they may start, the plain lookup they must beat.

N points, D their dimensions, K centres.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 2048  # points whose distances to all centres exist at one time
SEEDING_ROUNDS = 64
POINTS_PER_CENTRE = 64  # more points do not move the centres by much


class Clusters(NamedTuple):
    """Result of kmeans.

    Attributes:
      centres: float32 [K, D].
      distortion: float32 [iterations + 1], mean squared distance of a point to its nearest centre,
        for the seeds and after every iteration. Does not increase.
      counts: int32 [K], points of each centre.
    """

    centres: jax.Array
    distortion: jax.Array
    counts: jax.Array


def nearest(points: jax.Array, centres: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nearest centre of every point: int32 [N] and the squared distance, float32 [N]."""
    n, dimensions = points.shape
    chunk = min(CHUNK, n)
    padded = jnp.pad(points, ((0, -n % chunk), (0, 0))).reshape(-1, chunk, dimensions)
    norms = jnp.sum(centres ** 2, axis=-1)[None]

    def of_chunk(x):
        # Full precision: reduced products would make ties of centres that are not.
        distances = norms - 2 * jnp.matmul(x, centres.T, precision='highest')
        return jnp.argmin(distances, axis=-1), jnp.min(distances, axis=-1)

    ids, distances = jax.lax.map(of_chunk, padded)
    distances = distances.reshape(-1)[:n] + jnp.sum(points ** 2, axis=-1)
    return ids.reshape(-1)[:n].astype(jnp.int32), jnp.maximum(distances, 0)


def seed(points: jax.Array, k: int, key: jax.Array) -> jax.Array:
    """K of the points, far apart: D^2 seeding (Arthur & Vassilvitskii 2007) in rounds.

    A round draws several points at once, without replacement and with probability proportional to
    the squared distance to the centres so far. With K <= SEEDING_ROUNDS a round draws one point,
    which is k-means++ itself; above, the rounds turn K passes over the points into few products.
    """
    a_round = -(-k // SEEDING_ROUNDS)
    first, *keys = jax.random.split(key, 1 + -(-(k - 1) // a_round))
    start = points[jax.random.randint(first, (1,), 0, len(points))]
    if not keys:
        return start

    def draw(distances, key):
        scores = jnp.log(distances) + jax.random.gumbel(key, distances.shape)
        drawn = points[jax.lax.top_k(scores, a_round)[1]]
        return jnp.minimum(distances, nearest(points, drawn)[1]), drawn

    _, drawn = jax.lax.scan(draw, nearest(points, start)[1], jnp.stack(keys))
    return jnp.concatenate([start, drawn.reshape(-1, points.shape[1])])[:k]


@functools.partial(jax.jit, static_argnames=('k', 'iterations'))
def _kmeans(points, k, key, iterations):
    def iterate(centres, _):
        ids, distances = nearest(points, centres)
        counts = jnp.zeros(k, jnp.int32).at[ids].add(1)
        sums = jnp.zeros_like(centres).at[ids].add(points)
        # A centre without points moves to one of the points that fare worst.
        worst = points[jax.lax.top_k(distances, k)[1]]
        vacant = worst[jnp.cumsum(counts == 0) - 1]
        means = sums / jnp.maximum(counts, 1)[:, None]
        return jnp.where((counts == 0)[:, None], vacant, means), distances.mean()

    centres, distortion = jax.lax.scan(iterate, seed(points, k, key), length=iterations)
    ids, distances = nearest(points, centres)
    return Clusters(centres, jnp.append(distortion, distances.mean()),
                    jnp.zeros(k, jnp.int32).at[ids].add(1))


def kmeans(points: jax.Array, k: int, key: jax.Array, iterations: int = 6) -> Clusters:
    """Centres of float32 points [N, D] by D^2 seeding and Lloyd's iterations.

    Raises:
      ValueError: with fewer points than centres.
    """
    if len(points) < k:
        raise ValueError(f'k-means: {len(points)} points cannot make {k} centres; '
                         'give more images or a smaller vocab')
    return _kmeans(jnp.asarray(points, jnp.float32), k, key, iterations)


def gumbel_softmax(logits: jax.Array, tau: jax.Array | float, key: jax.Array | None) -> jax.Array:
    """Relaxed one-hot sample of a categorical [..., K] (sec. 2.1; Jang et al. 2017).

    Its argmax is an exact sample at any temperature. Without a key the noise is left out.
    """
    noise = 0.0 if key is None else jax.random.gumbel(key, logits.shape)
    return jax.nn.softmax((logits + noise) / tau)


def usage(ids: jax.Array, vocab: int) -> dict[str, tuple[jax.Array, float]]:
    """How the codes of a batch are used, as (value, 1.0).

    Args:
      ids: int codes of any shape.
      vocab: K.

    Returns:
      perplexity of the codes, 1 to K; codes_used, how many differ; alarm/codebook_collapse, 1 where
      those are fewer than 2 % of min(K, number of ids), else 0.
    """
    counts = jnp.bincount(ids.reshape(-1), length=vocab)
    used = jnp.sum(counts > 0)
    collapsed = used < 0.02 * min(vocab, ids.size)
    perplexity = jnp.exp(jnp.sum(jax.scipy.special.entr(counts / ids.size)))
    return {'perplexity': (perplexity, 1.0), 'codes_used': (used.astype(jnp.float32), 1.0),
            'alarm/codebook_collapse': (collapsed.astype(jnp.float32), 1.0)}


def patches(images: np.ndarray, factor: int) -> np.ndarray:
    """Images [B, S, S', 3] cut into squares, row by row: [B * S/f * S'/f, f * f * 3]."""
    b, h, w, c = images.shape
    cut = images.reshape(b, h // factor, factor, w // factor, factor, c).swapaxes(2, 3)
    return cut.reshape(-1, factor * factor * c)


def informative(squares: np.ndarray) -> np.ndarray:
    """Indices of the squares worth a centre: drawings and cartoons are mostly plain background.

    Keeps every square in which some colour channel varies by more than 2 of 255, and of the flat
    ones evenly spaced as many as 5 % of all squares. Photographs keep nearly everything.

    Args:
      squares: uint8 [N, f * f * 3], from `patches`.

    Returns:
      int64 [n], increasing.
    """
    channels = squares.reshape(len(squares), -1, 3)
    flat = (channels.max(axis=1) - channels.min(axis=1)).max(axis=-1) <= 2
    plain = np.flatnonzero(flat)
    kept = np.linspace(0, len(plain) - 1, min(len(plain), int(0.05 * len(squares)) + 1))
    return np.union1d(np.flatnonzero(~flat), plain[kept.astype(int)])


def gather(batches: Iterable[np.ndarray], features: Callable[[np.ndarray], jax.Array], factor: int,
           vocab: int) -> np.ndarray:
    """Features of informative squares, enough of them for k-means.

    Args:
      batches: uint8 images [B, S, S, 3]. Reading stops at POINTS_PER_CENTRE informative squares per
        code, or at four times as many squares in all, or with the last batch.
      features: images -> [B, S/f, S/f, D].
      factor: f.
      vocab: number of codes.

    Returns:
      float32 [N, D].
    """
    enough = POINTS_PER_CENTRE * vocab
    points, kept, seen = [], 0, 0
    for images in batches:
        found = np.asarray(features(images))
        found = found.reshape(-1, found.shape[-1])
        points.append(found[informative(patches(images, factor))])
        kept, seen = kept + len(points[-1]), seen + len(found)
        if kept >= enough or seen >= 4 * enough:
            break
    return np.concatenate(points)[:enough]


def distance_logits(centres: jax.Array, sharpness: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kernel [D, K] and bias [K] of logits -sharpness |x - centre|^2, up to a term without K."""
    return 2 * sharpness * centres.T, -sharpness * jnp.sum(centres ** 2, axis=-1)


def lookup_baseline(train_images: np.ndarray, images: np.ndarray, factor: int, vocab: int,
                    key: jax.Array) -> np.ndarray:
    """Images rebuilt from `vocab` squares of raw pixels: a tokenizer that has learned nothing.

    Report a dVAE's PSNR beside this one's: with few distinct squares in the data, a lookup is good.

    Args:
      train_images: uint8 [B, S, S, 3], where the squares come from.
      images: uint8 [B', S', S', 3], what is rebuilt.
      factor: side of a square; divides S and S'.
      vocab: number of squares.
      key: PRNG key.

    Returns:
      float32 [B', S', S', 3] in [0, 1].
    """
    def squares(images):
        return patches(np.asarray(images), factor) / np.float32(255)

    centres = kmeans(gather([train_images], squares, factor, vocab), vocab, key).centres
    ids, _ = jax.jit(nearest)(squares(images), centres)
    b, h, w, c = images.shape
    grid = np.asarray(centres)[np.asarray(ids)]
    grid = grid.reshape(b, h // factor, w // factor, factor, factor, c).swapaxes(2, 3)
    return grid.reshape(b, h, w, c)
