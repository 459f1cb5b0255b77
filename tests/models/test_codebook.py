"""k-means against planted clusters and brute force; the lookup that needs no learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import codebook


def blobs(clusters=12, each=40, dimensions=4, spread=0.05, seed=0):
    rng = np.random.default_rng(seed)
    centres = 10 * rng.normal(size=(clusters, dimensions))
    points = centres[:, None] + spread * rng.normal(size=(clusters, each, dimensions))
    order = rng.permutation(clusters * each)
    labels = np.repeat(np.arange(clusters), each)[order]
    return points.reshape(-1, dimensions)[order].astype(np.float32), centres, labels


@pytest.mark.parametrize('n', [1, 7, codebook.CHUNK + 5])  # below, at and over a chunk
def test_nearest_is_brute_force(n):
    rng = np.random.default_rng(n)
    points = rng.normal(size=(n, 5)).astype(np.float32)
    centres = rng.normal(size=(9, 5)).astype(np.float32)
    distances = ((points[:, None] - centres) ** 2).sum(-1)
    ids, squared = codebook.nearest(jnp.asarray(points), jnp.asarray(centres))
    np.testing.assert_array_equal(ids, distances.argmin(1))
    np.testing.assert_allclose(squared, distances.min(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_kmeans_recovers_planted_clusters(seed):
    points, centres, labels = blobs(seed=seed)
    found = codebook.kmeans(points, 12, jax.random.key(seed), iterations=10)
    ids, _ = codebook.nearest(jnp.asarray(points), found.centres)
    pairs = {(int(a), int(b)) for a, b in zip(ids, labels)}
    assert len(pairs) == 12  # one to one
    np.testing.assert_array_equal(np.sort(found.counts), 40)
    means = np.stack([points[np.asarray(ids) == k].mean(0) for k in range(12)])
    np.testing.assert_allclose(found.centres, means, atol=1e-4)


def test_kmeans_does_not_get_worse_and_beats_random_centres():
    points = np.random.default_rng(0).normal(size=(5000, 6)).astype(np.float32)
    found = codebook.kmeans(points, 200, jax.random.key(0))  # above SEEDING_ROUNDS
    distortion = np.asarray(found.distortion)
    assert np.all(np.diff(distortion) <= 1e-6) and distortion[-1] < 0.9 * distortion[0]
    random = codebook.nearest(jnp.asarray(points), jnp.asarray(points[:200]))[1].mean()
    assert distortion[-1] < 0.9 * random
    assert found.centres.shape == (200, 6) and int(found.counts.min()) > 0


def test_seeds_are_points_and_far_apart():
    points, _, labels = blobs(clusters=20, each=200)
    seeds = np.asarray(codebook.seed(jnp.asarray(points), 20, jax.random.key(0)))
    where = (points[:, None] == seeds).all(-1)
    assert where.any(0).all()
    assert len(set(labels[where.argmax(0)])) >= 19  # 20 uniform draws would meet about 13


def test_vacant_centres_move():
    # 99 % of the points are one point: seeds among them would stay vacant for ever.
    rng = np.random.default_rng(0)
    points = np.concatenate([np.zeros((990, 2)), rng.normal(size=(10, 2))]).astype(np.float32)
    found = codebook.kmeans(points, 11, jax.random.key(1))
    assert int((found.counts > 0).sum()) == 11 and float(found.distortion[-1]) < 1e-6


def test_too_few_points():
    with pytest.raises(ValueError, match='5 points cannot make 6 centres'):
        codebook.kmeans(np.zeros((5, 2)), 6, jax.random.key(0))


def test_logits_from_centres_choose_the_nearest():
    rng = np.random.default_rng(0)
    points, centres = rng.normal(size=(500, 8)), rng.normal(size=(64, 8))
    kernel, bias = codebook.distance_logits(jnp.asarray(centres), 3.0)
    logits = points @ np.asarray(kernel) + np.asarray(bias)
    distances = ((points[:, None] - centres) ** 2).sum(-1)
    np.testing.assert_array_equal(logits.argmax(1), distances.argmin(1))
    np.testing.assert_allclose(logits - logits[:, :1], -3 * (distances - distances[:, :1]),
                               rtol=1e-4, atol=1e-4)


def test_usage_and_its_alarm():
    ids = jnp.array([[0, 1], [2, 3]])
    even = codebook.usage(ids, 512)
    assert even['perplexity'][0] == pytest.approx(4) and even['codes_used'][0] == 4
    assert even['alarm/codebook_collapse'][0] == 0  # 4 positions cannot use 2 % of 512

    def alarm(used):
        return float(codebook.usage(jnp.arange(1000) % used, 512)['alarm/codebook_collapse'][0])

    assert alarm(10) == 1 and alarm(11) == 0  # 2 % of 512 is 10.24
    assert codebook.usage(jnp.zeros(64, int), 512)['alarm/codebook_collapse'][0] == 1


def test_patches_are_squares_in_raster_order():
    images = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    squares = codebook.patches(images, 2)
    assert squares.shape == (2 * 2 * 3, 12)
    np.testing.assert_array_equal(squares[1 * 6 + 1 * 3 + 2], images[1, 2:4, 4:6].reshape(-1))


def test_informative_thins_flat_squares():
    squares = np.full((1000, 4, 3), 200, np.uint8)
    squares[::10, 0, 1] = 100
    squares[1::10, 0, 1] = 199  # noise of a codec is flat too
    kept = codebook.informative(squares.reshape(1000, -1))
    assert set(range(0, 1000, 10)) <= set(kept) and len(kept) == 100 + 51
    noisy = np.random.default_rng(0).integers(0, 256, (50, 12), dtype=np.uint8)
    assert len(codebook.informative(noisy)) == 50


def test_gather_stops_when_it_has_enough():
    rng = np.random.default_rng(0)
    taken = []

    def batches():
        while True:  # an endless stream must not hang it, whatever is in it
            taken.append(1)
            flat = len(taken) % 2
            yield np.full((4, 8, 8, 3), 9, np.uint8) if flat else rng.integers(
                0, 256, (4, 8, 8, 3), dtype=np.uint8)

    points = codebook.gather(batches(), lambda x: x[:, ::4, ::4, :1].astype(np.float32), 4, 2)
    assert points.shape == (2 * codebook.POINTS_PER_CENTRE, 1) and len(taken) < 20


def test_lookup_is_lossless_with_enough_codes():
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)

    def mosaics(n):
        chosen = tiles[rng.integers(0, 10, (n, 3, 3))]
        return chosen.swapaxes(2, 3).reshape(n, 12, 12, 3)

    seen, new = mosaics(40), mosaics(5)
    rebuilt = codebook.lookup_baseline(seen, new, 4, 10, jax.random.key(0))
    assert rebuilt.shape == new.shape and rebuilt.dtype == np.float32
    np.testing.assert_allclose(rebuilt, new / 255, atol=1e-5)
    fewer = codebook.lookup_baseline(seen, new, 4, 5, jax.random.key(0))
    assert np.mean((fewer - new / 255) ** 2) > 1e-3
