"""Decoding against images built pixel by pixel; the crops against the paper's integer bounds."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalle_jax.data import images
from dalle_jax.data.records import BadRecord


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def coordinates(height, width):
    """Every pixel holds its own (y, x, 0)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8)


def uniform(counts, low, high, draws):
    """Whether all integers in [low, high) occur and about equally often, and no others do."""
    assert set(counts) <= set(range(low, high))
    expected = draws / (high - low)
    observed = np.array([counts.get(k, 0) for k in range(low, high)])
    # The sum of squares has mean high - low - 1 and twice that as its variance.
    chi2 = np.sum((observed - expected) ** 2) / expected
    freedom = high - low - 1
    assert chi2 <= freedom + 5 * np.sqrt(2 * freedom)


def tally(values):
    return dict(zip(*(part.tolist() for part in np.unique(list(values), return_counts=True))))


# --- decode ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, options', [
    ('PNG', {}), ('BMP', {}), ('WEBP', {'lossless': True}), ('TIFF', {})])
def test_decode_is_exact_for_lossless_files(kind, options):
    pixels = noise(5, 7)
    out = images.decode(encoded(Image.fromarray(pixels), kind, **options), 'x')
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, pixels)


def test_decode_grey_and_palette():
    grey = noise(5, 7, 0)
    expected = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(grey)), 'x'), expected)
    black_white = Image.fromarray(grey).point(lambda v: 255 * (v > 99), '1')
    out = images.decode(encoded(black_white), 'x')
    np.testing.assert_array_equal(out, np.where(expected > 99, 255, 0))
    palette = Image.new('P', (7, 5))
    palette.putdata((grey % 4).ravel().tolist())
    colours = noise(4, 3, 0, seed=1)
    palette.putpalette(colours.ravel().tolist())
    np.testing.assert_array_equal(images.decode(encoded(palette), 'x'), colours[grey % 4])
    # The same with palette entry 2 transparent: those pixels are white.
    out = images.decode(encoded(palette, transparency=2), 'x')
    colours[2] = 255
    np.testing.assert_array_equal(out, colours[grey % 4])


def test_decode_composites_on_white():
    pixels = noise(16, 16, 4)
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    out = images.decode(encoded(Image.fromarray(pixels)), 'x')
    np.testing.assert_allclose(out, colour * alpha + 255 * (1 - alpha), atol=1)
    grey = images.decode(encoded(Image.fromarray(pixels[..., [0, 3]], 'LA')), 'x')
    np.testing.assert_allclose(grey, (colour * alpha + 255 * (1 - alpha))[..., :1].repeat(3, -1),
                               atol=1)


def test_decode_scales_16_bit_grey():
    values = np.linspace(0, 65535, 35).reshape(5, 7).astype(np.uint16)
    out = images.decode(encoded(Image.fromarray(values)), 'x')
    expected = np.rint(values.astype(np.float64) / 65535 * 255)
    np.testing.assert_array_equal(out, np.repeat(expected[..., None], 3, -1))


def test_decode_cmyk():
    # Flat colours: cyan ink takes the red away, black ink everything.
    for ink, colour in [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)),
                        ((0, 0, 0, 0), (255, 255, 255))]:
        out = images.decode(encoded(Image.new('CMYK', (8, 8), ink), 'JPEG', quality=95), 'x')
        np.testing.assert_allclose(out, np.broadcast_to(colour, (8, 8, 3)), atol=3)


@pytest.mark.parametrize('orientation, upright', [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)), (8, lambda a: np.rot90(a, 1))])
def test_decode_applies_exif_orientation(orientation, upright):
    pixels, exif = noise(5, 7), Image.Exif()
    exif[0x0112] = orientation
    out = images.decode(encoded(Image.fromarray(pixels), exif=exif), 'x')
    np.testing.assert_array_equal(out, upright(pixels))


def test_decode_passes_arrays_through():
    pixels = noise(5, 7)
    assert images.decode(pixels, 'x') is pixels
    for wrong in (pixels[..., :1], pixels[0], pixels.astype(np.float32)):
        with pytest.raises(BadRecord, match=r'^x: array of \w+ \('):
            images.decode(wrong, 'x')


def claimed_png(width, height):
    """A file of a few bytes that claims to be an image of any size."""
    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', checksum)
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


JPEG = encoded(Image.fromarray(noise(64, 64)), 'JPEG')


@pytest.mark.parametrize('data, reason', [
    (b'', 'no image file of the formats JPEG'),
    (b'hello', 'no image file of the formats JPEG'),
    (JPEG[:20], '.+'),
    (JPEG[:len(JPEG) // 2], 'truncated'),
    (encoded(Image.fromarray(noise(64, 64)))[:3000], 'truncated'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'no image file of the formats JPEG'),
    (claimed_png(9000, 9000), '9000 x 9000 pixels; at most'),
    (claimed_png(60000, 60000), 'exceeds limit'),
    (claimed_png(8, 8), '.+'),
])
def test_decode_names_bad_files(data, reason):
    with pytest.raises(BadRecord, match=f'^photos/x.jpg: .*{reason}'):
        images.decode(data, 'photos/x.jpg')


# --- crops ----------------------------------------------------------------------------------------

def test_stage2_offsets_have_the_exact_bounds_of_listing_2():
    # With s = size nothing is resized, and the pixels tell where they come from.
    rng, size = np.random.default_rng(0), 16
    for slack in [*range(20), 40, 239]:
        low = 3 * slack // 8
        high = max(3 * slack // 8 + 1, 5 * slack // 8)
        draws = 200 * (high - low)
        for axis in (0, 1):
            image = coordinates(*((size + slack, size) if axis == 0 else (size, size + slack)))
            crops = [images.crop_stage2(image, size, rng) for _ in range(draws if axis else 20)]
            offsets = [int(crop[0, 0, axis]) for crop in crops]
            if axis:
                uniform(tally(offsets), low, high, draws)
            assert low <= min(offsets) and max(offsets) < high
            top, left = (offsets[-1], 0) if axis == 0 else (0, offsets[-1])
            np.testing.assert_array_equal(
                crops[-1], image[top:top + size, left:left + size])  # and is never mirrored
            assert all(np.all(np.diff(crop[:, :, 1].astype(int)) == 1) for crop in crops)


def test_stage1_offsets_are_uniform_and_half_of_the_crops_mirrored():
    rng, size, slack, draws = np.random.default_rng(0), 16, 12, 4000
    image = coordinates(size, size + slack)
    crops = [images.crop_stage1(image, size, rng) for _ in range(draws)]
    uniform(tally(crop[0, :, 1].min() for crop in crops), 0, slack + 1, draws)
    mirrored = [crop[0, 0, 1] > crop[0, 1, 1] for crop in crops]
    assert abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / np.sqrt(draws)
    for crop, flip in zip(crops[:50], mirrored):
        left = crop[0, :, 1].min()
        expected = image[:, left:left + size]
        np.testing.assert_array_equal(crop, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize('crop, size, s, low, high', [
    (images.crop_stage1, 256, 480, 288, 384),   # the paper's numbers
    (images.crop_stage1, 256, 300, 288, 300),
    (images.crop_stage1, 256, 270, 270, 270),
    (images.crop_stage2, 256, 480, 256, 288),
    (images.crop_stage2, 256, 270, 256, 270),
    (images.crop_stage1, 64, 200, 72, 96),
    (images.crop_stage2, 64, 200, 64, 72),
])
def test_resized_sides(crop, size, s, low, high, monkeypatch):
    squares = []

    def resize(image, top, left, s, t):
        assert 0 <= top <= image.shape[0] - s and 0 <= left <= image.shape[1] - s
        squares.append((s, int(t)))
        return np.zeros((t, t, 3), np.uint8)

    monkeypatch.setattr(images, '_resize_square', resize)
    rng, draws = np.random.default_rng(0), 40 * (high - low + 1)
    image = np.zeros((s, s + 30, 3), np.uint8)
    for _ in range(draws):
        assert crop(image, size, rng).shape == (size, size, 3)
    assert {square[0] for square in squares} == {s}
    uniform(tally(t for _, t in squares), low, high + 1, draws)


def test_the_last_crop_is_uniform(monkeypatch):
    monkeypatch.setattr(images, '_resize_square', lambda *_: coordinates(24, 24))
    rng, image, draws = np.random.default_rng(0), np.zeros((64, 64, 3), np.uint8), 3000
    for crop in (images.crop_stage1, images.crop_stage2):
        crops = [crop(image, 16, rng) for _ in range(draws)]
        uniform(tally(c[..., 0].min() for c in crops), 0, 9, draws)
        uniform(tally(c[..., 1].min() for c in crops), 0, 9, draws)


def test_area_resize_averages_whole_blocks():
    pixels = noise(60, 72)
    out = images._resize_square(pixels, 0, 12, 60, 20)
    blocks = pixels[:, 12:].reshape(20, 3, 20, 3, 3).mean((1, 3))
    # Pillow resizes the two axes in turn and rounds to 8 bits in between.
    np.testing.assert_allclose(out, blocks, atol=1.01)
    assert abs(out.mean() - blocks.mean()) < 0.1


@pytest.mark.parametrize('s, t', [(40, 40), (40, 31), (56, 23), (300, 287)])
def test_area_resize_gives_a_pixel_to_the_target_with_its_centre(s, t):
    pixels = noise(s + 3, s + 5)
    target = ((np.arange(s) + 0.5) * t / s).astype(int)  # s even, t odd: no centre is on a border
    weights = np.equal(target, np.arange(t)[:, None]).astype(float)
    weights /= weights.sum(1, keepdims=True)
    square = pixels[2:2 + s, 5:5 + s].astype(float)
    expected = np.einsum('ij,jkc,lk->ilc', weights, square, weights, optimize=True)
    out = images._resize_square(pixels, 2, 5, s, t)
    np.testing.assert_allclose(out, expected, atol=1.01)
    assert abs(out.mean() - square.mean()) < 2


def test_constant_images_stay_constant():
    image = np.full((70, 90, 3), (7, 128, 251), np.uint8)
    rng = np.random.default_rng(0)
    for kind in ('stage1', 'stage2', 'center', 'window'):
        out = images.crop(kind, image, 32, rng)
        assert out.dtype == np.uint8 and out.shape == (32, 32, 3)
        assert np.all(out == image[0, 0])


def test_center_crop():
    image = coordinates(16, 21)
    np.testing.assert_array_equal(images.crop_center(image, 16), image[:, 2:18])
    np.testing.assert_array_equal(images.crop_center(image.swapaxes(0, 1), 16),
                                  image.swapaxes(0, 1)[2:18])
    # Scaled by 1/4: the centre of the crop is the centre of the image, on both axes.
    ramp = coordinates(128, 200)
    out = images.crop_center(ramp, 32).astype(float)
    np.testing.assert_allclose(out[..., 0].mean(), 63.5, atol=1)
    np.testing.assert_allclose(out[..., 1].mean(), 99.5, atol=1)
    np.testing.assert_allclose(np.diff(out[4, 4:-4, 1]), 4, atol=1)


def test_window_is_uniform_and_never_resized():
    rng, image, draws = np.random.default_rng(0), coordinates(20, 24), 4000
    crops = [images.crop_window(image, 16, rng) for _ in range(draws)]
    uniform(tally(crop[0, 0, 0] for crop in crops), 0, 5, draws)
    uniform(tally(crop[0, 0, 1] for crop in crops), 0, 9, draws)
    assert all(np.all(crop - crop[0, 0] == coordinates(16, 16)) for crop in crops)


def test_none_takes_exact_sizes_only():
    image = noise(16, 16)
    assert images.crop('none', image, 16, None) is image
    for wrong in (noise(16, 17), noise(32, 32)):
        with pytest.raises(BadRecord, match='^x: .* exactly 16 x 16; choose another crop'):
            images.crop('none', wrong, 16, None, 'x')


@pytest.mark.parametrize('kind', ['stage1', 'stage2', 'center', 'window'])
def test_small_images_are_bad_records(kind):
    rng = np.random.default_rng(0)
    assert images.crop(kind, noise(16, 40), 16, rng).shape == (16, 16, 3)
    with pytest.raises(BadRecord, match='^x: 40 x 15 pixels, and the short side must have at least '
                                        '16'):
        images.crop(kind, noise(15, 40), 16, rng, 'x')


def test_crops_repeat_with_their_generator():
    image = noise(60, 80)
    for kind in images.CROPS[:-1]:
        first, second, other = (
            images.crop(kind, image, 32, np.random.default_rng(seed)) for seed in (5, 5, 6))
        np.testing.assert_array_equal(first, second)
        assert (kind == 'center') == np.array_equal(first, other)
    with pytest.raises(ValueError, match="'stage3' is none of stage1, stage2"):
        images.crop('stage3', image, 32, np.random.default_rng(0))


def test_crop_clip_is_what_transformers_shows_its_clip():
    """Made by tests/interop/parity.py. Of uneven margins theirs leaves out the smaller one first."""
    stored = np.load(Path(__file__).parent.parent / 'interop' / 'fixtures' / 'resized.npz')
    for name in (name for name in stored if name.startswith('in_')):
        expected = stored[name.replace('in_', 'out_')]
        found = images.crop_clip(stored[name], 12)
        assert found.shape == (12, 12, 3) and found.dtype == np.uint8
        height, width = stored[name].shape[:2]
        margins = [12 * side // min(height, width) - 12 for side in (height, width)]
        shift = [round(m / 2) - m // 2 for m in margins]
        np.testing.assert_array_equal(found[:12 - shift[0], :12 - shift[1]],
                                      expected[shift[0]:, shift[1]:], name)


@given(st.integers(3, 40), st.integers(3, 40), st.integers(2, 30))
def test_crop_clip_is_the_center_of_the_resized_image(height, width, size):
    image = noise(height, width)
    short = min(height, width)
    sides = int(size * width / short), int(size * height / short)
    whole = np.asarray(Image.fromarray(image).resize(sides, Image.Resampling.BICUBIC))
    top, left = round((sides[1] - size) / 2.0), round((sides[0] - size) / 2.0)
    np.testing.assert_array_equal(images.crop_clip(image, size),
                                  whole[top:top + size, left:left + size])
