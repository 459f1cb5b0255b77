"""Sets of images become numbers as fid.py makes them of all features at once."""

import numpy as np
import pytest

from dalle_jax.metrics import fid, quality
from dalle_jax.metrics.blur import blur

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 90, 8, 8, 3), np.uint8)
MIX = RNG.normal(size=(192, 6))


def network(images):
    flat = images.reshape(len(images), -1) / 255
    return (flat @ MIX).astype(np.float32), (flat @ MIX[:, :4] * 3).astype(np.float32)


def parts(images):
    return (images[i:i + 40] for i in range(0, len(images), 40))


def measure(images, *radii, keep=True):
    found = quality.measure(network, parts(images), radii or (0,), 3, keep)
    return found if radii else found[0]


@pytest.mark.parametrize('rows', [30, 4096])
def test_in_parts_is_at_once(monkeypatch, rows):
    monkeypatch.setattr(quality, 'ROWS', rows)
    one, two = (measure(images, 0, 1) for images in IMAGES)
    for radius in (0, 1):
        features, logits = zip(*(network(blur(images, radius)) for images in IMAGES))
        found = quality.compare(one[radius], two[radius], 5, 1000)
        gaussians = [fid.gaussian(fid.moments(f)) for f in features]
        assert found['fid'] == pytest.approx(fid.frechet_distance(*gaussians), rel=1e-9)
        score = fid.inception_score(logits[0], 3, seed=2020)
        assert (found['inception_score'], found['inception_score_std']) == pytest.approx(score)
        if radius:  # whose features are not kept
            assert 'kid' not in found
        else:
            assert found['kid'] == fid.kernel_distance(*features, 1, 90)[0]
            assert found['kid_subset'] == 90 and 'kid_std' not in found
            several = quality.compare(one[radius], two[radius], 5, 50)
            assert (several['kid'], several['kid_std']) == fid.kernel_distance(*features, 5, 50)
        assert found['images'] == 90
        assert quality.compare(one[radius], one[radius], 5, 50)['fid'] < 1e-6 < found['fid']


def test_files_hold_all_of_it_and_are_those_of_pytorch_fid(tmp_path):
    found = measure(IMAGES[0])
    quality.write(lambda path, arrays: np.savez(path, **arrays), tmp_path / 'a.npz', found,
                  {'blur': 0})
    assert quality.about(tmp_path / 'a.npz') == {'blur': 0}
    again = quality.read(tmp_path / 'a.npz')
    assert (again.count, again.inception_score) == (90, found.inception_score)
    np.testing.assert_array_equal(again.features, found.features)
    np.testing.assert_array_equal(again.gaussian.covariance, found.gaussian.covariance)
    np.savez(tmp_path / 'b.npz', mu=found.gaussian.mean, sigma=found.gaussian.covariance)
    plain = quality.read(tmp_path / 'b.npz')
    assert quality.about(tmp_path / 'b.npz') == {}
    assert (plain.count, plain.inception_score, plain.features) == (0, None, None)
    compared = quality.compare(found, plain, 5, 50)
    assert compared['fid'] < 1e-6 and 'kid' not in compared


def test_too_few_and_broken_images_are_told():
    with pytest.raises(ValueError, match='6 features needs at least 7 images, and there are 6'):
        measure(IMAGES[0, :6])
    with pytest.raises(ValueError, match='no images'):
        quality.measure(network, iter(()), (0,), 3)
    with pytest.raises(ValueError, match='not finite'):
        quality.measure(lambda x: (np.full((len(x), 6), np.nan), network(x)[1]), parts(IMAGES[0]),
                        (0,), 3)
