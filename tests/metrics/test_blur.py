"""Blurs against SciPy's, which knows nothing of matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dalle_jax.metrics.blur import blur, matrix

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 33, 3), np.uint8)


@pytest.mark.parametrize('radius', [0.5, 1, 2, 4, 8])
def test_is_the_gaussian_of_scipy(radius):
    want = ndimage.gaussian_filter(IMAGES.astype(np.float64), (0, radius, radius, 0),
                                   mode='reflect', truncate=4.0)
    assert np.abs(blur(IMAGES, radius) - want).max() <= 0.5 + 1e-3


@given(extent=st.integers(1, 80), radius=st.floats(0.1, 10))
@settings(deadline=None)
def test_weights_add_up_and_are_symmetric(extent, radius):
    if int(4 * radius + 0.5) > extent:
        with pytest.raises(ValueError, match=f'images of {extent} pixels; give 0 to'):
            matrix(extent, radius)
        return
    found = matrix(extent, radius)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=1e-7)
    assert (found >= 0).all()


def test_radius_zero_is_nothing():
    assert blur(IMAGES, 0) is IMAGES
    with pytest.raises(ValueError, match='blur radius -1'):
        blur(IMAGES, -1)
