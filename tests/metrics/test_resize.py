"""The three ways to Inception's 299 x 299 pixels: against the originals and their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.metrics.resize import RESIZES, resize
from tests.metrics import originals


@pytest.mark.parametrize('height,width', originals.SIZES)
@pytest.mark.parametrize('how', RESIZES)
def test_originals(how, height, width):
    with np.load(originals.STORED) as file:
        expected = file[f'resize/{how}/{height}x{width}'].transpose(0, 2, 3, 1)
    match how:
        case 'tensorflow':
            expected = (expected - 128) / 128
        case 'pytorch':
            expected = 2 * expected - 1
        case 'clean':
            expected = (expected.clip(0, 255) - 128) / 128
    found = resize(originals.images(height, width), how, 20)
    assert found.dtype == np.float32 and found.shape == (2, 20, 20, 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def weights(how, extent, size):
    """float64 [size, extent]: each pixel's share in each pixel of the result, by definition."""
    found = np.zeros((size, extent))
    scale = extent / size
    for i in range(size):
        if how == 'clean':
            # Keys' cubic with a = -1/2, widened where the image shrinks; normalised at borders.
            distance = np.abs(np.arange(extent) + 0.5 - (i + 0.5) * scale) / max(scale, 1)
            found[i] = np.where(
                distance < 1, 1.5 * distance**3 - 2.5 * distance**2 + 1,
                np.where(distance < 2, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2,
                         0))
            found[i] /= found[i].sum()
        else:
            where = i * scale if how == 'tensorflow' else max((i + 0.5) * scale - 0.5, 0)
            low = min(int(where + 1e-9), extent - 1)
            found[i, low] += 1 - (where - low)
            found[i, min(low + 1, extent - 1)] += where - low
    return found


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(RESIZES), st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
def test_definition(how, height, width, size):
    images = originals.images(height, width, 1)
    expected = np.einsum('ih,bhwc,jw->bijc', weights(how, height, size), images,
                         weights(how, width, size)).clip(0, 255)
    expected = 2 * expected / 255 - 1 if how == 'pytorch' else (expected - 128) / 128
    # Positions in float32 are off by 40 pixels x 6e-8.
    np.testing.assert_allclose(resize(images, how, size), expected, atol=2e-5)


@pytest.mark.parametrize('how,white', [('tensorflow', 127 / 128), ('pytorch', 1),
                                       ('clean', 127 / 128)])
def test_value_range(how, white):
    images = np.stack([np.full((7, 9, 3), value, np.uint8) for value in (0, 255)])
    found = np.asarray(resize(images, how))
    assert found.shape == (2, 299, 299, 3)
    np.testing.assert_allclose(found[0], -1, atol=1e-6)
    np.testing.assert_allclose(found[1], white, atol=1e-6)


def test_unknown():
    with pytest.raises(ValueError, match="'area' is none of tensorflow, pytorch, clean"):
        resize(originals.images(8, 8), 'area')
