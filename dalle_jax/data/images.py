"""Encoded images to uint8 arrays, and the crops that training and evaluation see.

Ramesh et al. 2021, listings 1 and 2, with their 256 as `size`: stage 1 (the dVAE) takes a square
anywhere in the image, shrinks it and crops it at random, then mirrors it half of the time; stage 2
(the transformer) takes a square near the centre and never mirrors, since images may contain text.

The listings resize with TensorFlow 1's AREA method and align_corners=True, we with Pillow's BOX
filter. Both average the source pixels under each target pixel. AREA weighs a pixel on the border of
two targets by its share and steps by (s - 1) / (t - 1); BOX gives such a pixel wholly to the target
that holds its centre and steps by s / t. Where s is a multiple of t, BOX is the exact mean.

H, W: height and width of the image at hand; s: side of the square taken; t: side it is resized to.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dalle_jax.data.records import BadRecord

CROPS = ('stage1', 'stage2', 'center', 'window', 'none')

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')  # no format that runs an interpreter

MAX_PIXELS = 1 << 26  # 8192 x 8192; a small file can claim any size and exhaust the memory


def decode(image: bytes | np.ndarray, name: str) -> np.ndarray:
    """Returns an image as uint8 [H, W, 3], upright, in RGB.

    Transparency is composited on white, grey, palette and CMYK become RGB, 16-bit grey is scaled to
    8 bits, the EXIF orientation is applied, and of an animation the first frame counts.

    Args:
      image: the bytes of a file, or uint8 [H, W, 3], which is returned as it is.
      name: what messages call the image.

    Raises:
      BadRecord: if it cannot be read, naming it and the reason.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise BadRecord(f'{name}: array of {image.dtype} {image.shape}, not of uint8 [H, W, 3]')
        return image
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f'{file.width} x {file.height} pixels; at most {MAX_PIXELS} are '
                                 'decoded, scale it down')
            ImageOps.exif_transpose(file, in_place=True)
            return np.asarray(_rgb(file))
    except UnidentifiedImageError as error:
        raise BadRecord(f'{name}: no image file of the formats {", ".join(FORMATS)}') from error
    # Broken files make Pillow raise anything from OSError to SyntaxError and struct.error.
    except Exception as error:
        raise BadRecord(f'{name}: {error or type(error).__name__}') from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith('I'):
        # 16-bit grey, which Pillow would clip at 255 instead of scaling.
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8)).convert('RGB')
    if image.has_transparency_data:
        white = Image.new('RGBA', image.size, 'white')
        return Image.alpha_composite(white, image.convert('RGBA')).convert('RGB')
    return image if image.mode == 'RGB' else image.convert('RGB')


def crop(kind: str, image: np.ndarray, size: int, rng: np.random.Generator,
         name: str = 'image') -> np.ndarray:
    """Applies the crop called `kind`, one of CROPS: uint8 [H, W, 3] -> uint8 [size, size, 3]."""
    match kind:
        case 'stage1':
            return crop_stage1(image, size, rng, name)
        case 'stage2':
            return crop_stage2(image, size, rng, name)
        case 'center':
            return crop_center(image, size, name)
        case 'window':
            return crop_window(image, size, rng, name)
        case 'none':
            return crop_none(image, size, name)
    raise ValueError(f'crop {kind!r} is none of {", ".join(CROPS)}')


def crop_stage1(image: np.ndarray, size: int, rng: np.random.Generator,
                name: str = 'image') -> np.ndarray:
    """Listing 1: a square at a uniform position, resized, cropped at random, mirrored or not.

    t is uniform over the integers from min(s, 9/8 size) to min(s, 12/8 size), both rounded.
    """
    s = _short_side(image, size, name)
    top, left = (rng.integers(side - s + 1) for side in image.shape[:2])
    low, high = min(s, round(size * 9 / 8)), min(s, round(size * 12 / 8))
    square = _resize_square(image, top, left, s, rng.integers(low, high + 1))
    window = crop_window(square, size, rng, name)
    return window[:, ::-1] if rng.integers(2) else window


def crop_stage2(image: np.ndarray, size: int, rng: np.random.Generator,
                name: str = 'image') -> np.ndarray:
    """Listing 2: a square in the middle quarter of its possible positions, resized, cropped.

    t is uniform over the integers from size to min(s, 9/8 size), rounded.
    """
    s = _short_side(image, size, name)
    top, left = (_central_offset(side - s, rng) for side in image.shape[:2])
    high = min(s, round(size * 9 / 8))
    square = _resize_square(image, top, left, s, rng.integers(size, high + 1))
    return crop_window(square, size, rng, name)


def crop_center(image: np.ndarray, size: int, name: str = 'image') -> np.ndarray:
    """The evaluation crop: the short side resized to `size` (Lanczos), then the central square."""
    s = _short_side(image, size, name)
    if s > size:
        height, width = (round(side * size / s) for side in image.shape[:2])
        image = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top:top + size, left:left + size]


def crop_clip(image: np.ndarray, size: int) -> np.ndarray:
    """What the released CLIPs see: the short side resized to `size`, then the central square.

    Bicubic, up as well as down, with a filter as wide as the source pixels of a target pixel
    (Pillow's own). Uneven margins are rounded to even numbers, as in the released code.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if short != size:
        height, width = (size * side // short for side in (height, width))
        image = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (round((side - size) / 2) for side in (height, width))
    return image[top:top + size, left:left + size]


def crop_window(image: np.ndarray, size: int, rng: np.random.Generator,
                name: str = 'image') -> np.ndarray:
    """A square of size x size pixels at a uniform position, without any resizing."""
    _short_side(image, size, name)
    top, left = (rng.integers(side - size + 1) for side in image.shape[:2])
    return image[top:top + size, left:left + size]


def crop_none(image: np.ndarray, size: int, name: str = 'image') -> np.ndarray:
    """The image itself. Raises BadRecord unless it has size x size pixels."""
    if image.shape[:2] != (size, size):
        height, width = image.shape[:2]
        raise BadRecord(f'{name}: {width} x {height} pixels, and crop "none" takes exactly '
                        f'{size} x {size}; choose another crop')
    return image


def _central_offset(slack: int, rng: np.random.Generator) -> int:
    """Uniform over the integers in [3/8 slack, 5/8 slack), or its first one where that is empty."""
    low = 3 * slack // 8
    return rng.integers(low, max(low + 1, 5 * slack // 8))


def _resize_square(image: np.ndarray, top: int, left: int, s: int, t: int) -> np.ndarray:
    """The s x s square at (top, left) as uint8 [t, t, 3], t <= s, averaged by area."""
    box = left, top, left + s, top + s
    return np.asarray(Image.fromarray(image).resize((t, t), Image.Resampling.BOX, box=box))


def _short_side(image: np.ndarray, size: int, name: str) -> int:
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise BadRecord(f'{name}: {width} x {height} pixels, and the short side must have at least '
                        f'{size}')
    return min(height, width)
