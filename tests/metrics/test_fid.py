"""FID, IS and KID: against the originals' results, closed forms and other computations."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.metrics import fid
from tests.metrics import originals


@pytest.fixture(scope='module')
def stored():
    with np.load(originals.STORED) as file:
        return {name: file[name] for name in file if name.split('/')[0] in ('fid', 'is', 'kid')}


def gaussian(features):
    return fid.gaussian(fid.moments(features))


def random_gaussian(rng, size, scale, rank=None):
    root = rng.standard_normal((size, rank or size)) * np.geomspace(1, scale, rank or size)
    return fid.Gaussian(rng.standard_normal(size), root @ root.T)


# -- FID -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('original', ['pytorch-fid', 'torch-fidelity'])
def test_fid_of_the_originals(stored, original):
    found = fid.frechet_distance(*(gaussian(originals.features(seed)) for seed in (0, 1)))
    np.testing.assert_allclose(found, stored[f'fid/{original}'], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1.0, 1e-2, 1e-5]), st.integers(0, 2**32 - 1))
def test_fid_is_that_of_the_root_of_the_product(size, scale, seed):
    rng = np.random.default_rng(seed)
    a, b = (random_gaussian(rng, size, scale) for _ in range(2))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = (np.sum((a.mean - b.mean) ** 2)
                + np.trace(a.covariance + b.covariance - 2 * root))
    np.testing.assert_allclose(fid.frechet_distance(a, b), expected, rtol=1e-5)
    np.testing.assert_allclose(fid.frechet_distance(b, a), expected, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1e-6, 0.3, 2.0, 1e3])] * 2), min_size=1,
                max_size=20), st.integers(0, 2**32 - 1))
def test_fid_of_covariances_that_commute(deviations, seed):
    """The sum of squared differences of standard deviations, in any basis, some of them 0."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((len(deviations),) * 2))[0]
    change = rng.standard_normal(len(deviations))
    a, b = (fid.Gaussian(m, basis * np.square(s) @ basis.T) for m, s in
            zip((change, 0 * change), np.transpose(deviations)))
    expected = np.sum(change**2) + np.sum(np.subtract(*np.transpose(deviations)) ** 2)
    # An eigenvalue 0 is found as about 1e-16 of the largest, whose root is 1e-8.
    atol = 1e-7 * np.square(deviations).max() + 1e-9
    np.testing.assert_allclose(fid.frechet_distance(a, b), expected, rtol=1e-6, atol=atol)


def test_fid_of_singular_covariances():
    """As where features are constant: of A = a a' and B = b b' the root has the trace |a' b|."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30))
    found = fid.frechet_distance(*(fid.Gaussian(0 * x, np.outer(x, x)) for x in (a, b)))
    np.testing.assert_allclose(found, a @ a + b @ b - 2 * abs(a @ b), rtol=1e-6)


def test_fid_of_constant_features():
    a, b = (fid.Gaussian(np.full(3, mean), variance * np.eye(3)) for mean, variance in
            ((1.0, 0.0), (3.0, 4.0)))
    np.testing.assert_allclose(fid.frechet_distance(a, b), 3 * (4 + 4))
    np.testing.assert_allclose(fid.frechet_distance(b, a), 3 * (4 + 4))


def test_fid_with_itself_is_zero():
    found = gaussian(originals.features(0))
    assert 0 <= fid.frechet_distance(found, found) < 1e-9 * np.trace(found.covariance)


def test_fid_refuses_different_features():
    a, b = (gaussian(originals.features(0, size=size)) for size in (5, 6))
    with pytest.raises(ValueError, match='5 and 6 features.*same layer'):
        fid.frechet_distance(a, b)


# -- moments ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 99), max_size=6), st.booleans(),
       st.sampled_from([0.0, 1.0, 1e4]), st.integers(0, 2**32 - 1))
def test_moments_of_parts_are_those_of_all(cuts, backwards, offset, seed):
    rng = np.random.default_rng(seed)
    features = offset + rng.standard_normal((100, 7)) @ rng.standard_normal((7, 7))
    parts = [fid.moments(part) for part in np.split(features, sorted(set(cuts)))]
    total = parts[-1] if backwards else parts[0]
    for part in parts[-2::-1] if backwards else parts[1:]:
        total = fid.merge(total, part)
    found, spread = fid.gaussian(total), features.std()
    assert total.count == 100
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12 * spread)
    # A feature of 1e4 is itself rounded by 1e-12.
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=0,
                               atol=1e-12 * spread * max(spread, offset))


def test_moments_of_many_rows(monkeypatch):
    features = originals.features(0)
    whole = fid.moments(features)
    monkeypatch.setattr(fid, 'ROWS_AT_ONCE', 37)
    parts = fid.moments(features)
    assert parts.count == whole.count == 400
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(parts.scatter, whole.scatter, rtol=1e-12,
                               atol=1e-12 * whole.scatter.max())


def test_too_few_images():
    with pytest.raises(ValueError, match='48 features needs at least 49 images.* are 48.*rank'):
        gaussian(originals.features(0, images=48))
    assert np.linalg.matrix_rank(gaussian(originals.features(0, images=49)).covariance) == 48


@pytest.mark.parametrize('features,message', [
    (np.full((50, 3), 0.1), 'all 50 images have the same features'),
    (np.zeros((50, 3)), 'all 50 images have the same features'),
    (np.ones((50, 3, 1)), r'\[50, 3, 1\] must be \[N, D\]'),
    (np.ones((0, 3)), r'\[0, 3\].*at least one image'),
    (np.where(np.arange(50)[:, None] > 47, np.nan, np.ones((50, 3))),
     'features of 2 of 50 images, first of image 48, are not finite'),
    (np.full((5, 3), np.inf), 'features of 5 of 5 images')])
def test_broken_features(features, message):
    with pytest.raises(ValueError, match=message):
        gaussian(features)


def test_statistics_files(tmp_path):
    found = gaussian(originals.features(0))
    fid.write_gaussian(tmp_path / 'own.npz', found)
    np.savez(tmp_path / 'other.npz', mu=found.mean.astype(np.float32), sigma=found.covariance)
    with np.load(tmp_path / 'own.npz') as file:
        assert set(file) == {'mu', 'sigma'}
    read = fid.read_gaussian(tmp_path / 'own.npz')
    np.testing.assert_array_equal(read.mean, found.mean)
    np.testing.assert_array_equal(read.covariance, found.covariance)
    assert fid.read_gaussian(tmp_path / 'other.npz').mean.dtype == np.float64
    assert [p.name for p in tmp_path.glob('own*')] == ['own.npz']


@pytest.mark.parametrize('arrays,message', [
    ({'mu': np.ones(3)}, 'with mu and sigma'),
    ({'mu': np.ones(3), 'sigma': np.eye(4)}, r'mu \[3\] and sigma \[4, 4\]'),
    ({'mu': np.ones(3), 'sigma': np.eye(3) * np.nan}, 'not finite'),
    ({'mu': np.ones(3), 'sigma': np.triu(np.ones((3, 3)))}, 'not symmetric')])
def test_broken_statistics_files(tmp_path, arrays, message):
    np.savez(tmp_path / 'a.npz', **arrays)
    with pytest.raises(ValueError, match=f'a.npz.*{message}'):
        fid.read_gaussian(tmp_path / 'a.npz')


def test_no_statistics_file(tmp_path):
    (tmp_path / 'a.npz').write_text('mu')
    for name in ('a.npz', 'b.npz'):
        with pytest.raises(ValueError, match=f'{name}.*no statistics file'):
            fid.read_gaussian(tmp_path / name)


# -- IS --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('order,seed', [('ordered', None), ('shuffled', 2020)])
def test_is_of_the_original(stored, order, seed):
    found = fid.inception_score(originals.features(0), 7, seed)
    np.testing.assert_allclose(found, stored[f'is/{order}'], rtol=1e-9)


def test_is_of_certain_and_of_uncertain_images():
    with np.errstate(divide='ignore'):
        certain = np.log(np.eye(8)[np.arange(80) % 8])
    np.testing.assert_allclose(fid.inception_score(certain, 10), (8, 0), atol=1e-12)
    np.testing.assert_allclose(fid.inception_score(certain[::8], 1), (1, 0), atol=1e-12)
    np.testing.assert_allclose(fid.inception_score(np.full((20, 8), 3.0), 4), (1, 0), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_is_by_its_formula(images, classes, splits, seed):
    """exp of the mean divergence of an image's classes from those of all."""
    splits = min(splits, images)
    logits = np.random.default_rng(seed).normal(500, 3, (images, classes))
    chances = scipy.special.softmax(logits, axis=1)
    parts = [chances[i * images // splits:(i + 1) * images // splits] for i in range(splits)]
    expected = [np.exp(np.mean([scipy.stats.entropy(row, part.mean(axis=0)) for row in part]))
                for part in parts]
    np.testing.assert_allclose(fid.inception_score(logits, splits),
                               (np.mean(expected), np.std(expected)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('logits,splits,message', [
    (np.zeros((9, 3)), 10, '10 parts.*there are 9'),
    (np.zeros((9, 3)), 0, '0 parts'),
    (np.full((9, 3), np.nan), 3, 'none of them nan'),
    (np.full((9, 3), -np.inf), 3, 'some above -inf'),
    (np.zeros(9), 3, r'\[9\] must be \[N, C\]')])
def test_is_refuses(logits, splits, message):
    with pytest.raises(ValueError, match=message):
        fid.inception_score(logits, splits)


# -- KID -------------------------------------------------------------------------------------------


def test_kid_of_the_original(stored):
    found = fid.kernel_distance(originals.features(0), originals.features(1), 10, 100, 2020)
    np.testing.assert_allclose(found, stored['kid'], rtol=1e-4)  # the original is in float32


def test_kid_by_its_formula():
    x, y = (originals.features(seed, 20, 4).astype(np.float64) for seed in (0, 1))
    kernel = lambda a, b: (np.dot(a, b) / 4 + 1) ** 3  # noqa: E731
    alike = [kernel(a[i], a[j]) for a in (x, y) for i in range(20) for j in range(20) if i != j]
    between = [kernel(a, b) for a in x for b in y]
    np.testing.assert_allclose(fid.kernel_distance(x, y, 1, 20),
                               (2 * np.mean(alike) - 2 * np.mean(between), 0), rtol=1e-10)


def test_kid_is_unbiased():
    """Of two halves of one distribution it is 0 on average, and often negative."""
    features = np.random.default_rng(0).standard_normal((4000, 6))
    mean, deviation = fid.kernel_distance(features[:2000], features[2000:], 200, 20)
    assert abs(mean) < 4 * deviation / np.sqrt(200)
    other, _ = fid.kernel_distance(features[:2000], 1.5 * features[2000:], 200, 20)
    assert other > 20 * abs(mean)


@pytest.mark.parametrize('subsets,size', [(10, 401), (10, 1), (0, 10)])
def test_kid_refuses(subsets, size):
    with pytest.raises(ValueError, match=f'{subsets} subsets of {size} images.* 2 to 400'):
        fid.kernel_distance(originals.features(0), originals.features(1), subsets, size)
