"""Reads images of scenes back and scores them against captions, with no learned part.

What is seen in an image, in this order:

    background   the palette colour nearest to the median of the image's border
    things       connected regions that differ from it by > CONTRAST and cover >= MIN_AREA
    colour       the palette colour nearest to the median of a region's interior, or none if more
                 than MAX_MIXED of the interior is nearer to other colours
    shape, size  the template with the largest intersection over union with the region
    relation     which way, mostly, from the first centroid to the second

The generator's formulas are not used: templates are rasterised from outlines by counting sample
points, so a drawing error there cannot hide here.

Letters: S image side in pixels, n images, W window side of a template, T templates, m regions.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dalle_jax.data.scenes import (
    BACKGROUNDS, COLOURS, CROSS_HALF_WIDTH, RADII, RELATIONS, RING_HOLE, SHAPES, SIZES,
    SQUARE_HALF_SIDE, STAR_NOTCH, Scene, SceneConfig, Thing, caption, parse)

ATTRIBUTES = ('count', 'background', 'colour', 'shape', 'size', 'relation')
CONTRAST = 0.22  # Euclidean distance in RGB, of [0, 1] a channel
MIN_AREA = 0.006  # of the image
MAX_MIXED = 0.4  # share of a region's interior that may be of other colours
MIN_QUALITY = 0.7
CHUNK = 128  # images read at once
SUBSAMPLES = 8  # a side of a pixel, for the templates


class _Seen(NamedTuple):
    """What n images show; -1 stands for what is not there, and for a thing of no single colour."""

    background: np.ndarray  # [n] index into BACKGROUNDS
    count: np.ndarray  # [n] regions, of which the largest two are described
    things: np.ndarray  # [n, 2, 3] indices into SIZES, COLOURS, SHAPES
    relation: np.ndarray  # [n] index into RELATIONS, from slot 0 to slot 1
    quality: np.ndarray  # [n, 2] intersection over union with the best template, 0 for no thing


def judge(config: SceneConfig, images: np.ndarray,
          captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether images show what their captions say.

    Args:
      config: the setting the images belong to; its palette is what colours are read against.
      images: [n, S, S, 3], uint8 or floating point in [0, 1].
      captions: n captions, in any template.

    Returns:
      Bool [n] each: 'count', 'background', 'colour', 'shape', 'size', 'relation' and 'all'; and
      'quality', float32 [n], the worse intersection over union of the things seen (0 for none).
      An attribute is right if it is for every thing of the caption, so a missing thing fails
      colour, shape, size and relation too; the relation of a single thing is always right. Things
      are matched to the caption's in the order that fits better. 'all' needs every attribute and
      quality >= MIN_QUALITY.

    Raises:
      ValueError: a caption that does not parse, or arrays that do not fit.
    """
    images = np.asarray(images)
    _check(config, images)
    if len(captions) != len(images):
        raise ValueError(f'{len(images)} images but {len(captions)} captions to judge them by')
    told = [parse(text) for text in captions]
    count = np.array([len(scene.things) for scene in told], int)
    double = count == 2
    background = np.array([list(BACKGROUNDS).index(scene.background) for scene in told], int)
    relation = np.array([RELATIONS.index(s.relation) if s.relation else -1 for s in told], int)
    things = np.full((len(told), 2, 3), -1)
    for i, scene in enumerate(told):
        for j, (size, colour, shape) in enumerate(scene.things):
            things[i, j] = SIZES.index(size), list(COLOURS).index(colour), SHAPES.index(shape)

    seen = _look(config, images)
    same, related = things == seen.things, relation == seen.relation
    same_swapped = things == seen.things[:, ::-1]
    related_swapped = np.where(double, (relation + 2) % 4, -1) == seen.relation
    same[~double, 1] = same_swapped[~double, 1] = True
    swap = same_swapped.sum((1, 2)) + related_swapped > same.sum((1, 2)) + related
    same = np.where(swap[:, None, None], same_swapped, same).all(1)
    related = np.where(swap, related_swapped, related) | ~double
    right = {
        'count': count == seen.count, 'background': background == seen.background,
        'colour': same[:, 1], 'shape': same[:, 2], 'size': same[:, 0], 'relation': related,
    }
    quality = np.where(seen.count > 1, seen.quality.min(1), seen.quality[:, 0])
    right['all'] = np.all([right[name] for name in ATTRIBUTES], 0) & (quality >= MIN_QUALITY)
    return {**right, 'quality': quality}


def read(config: SceneConfig, images: np.ndarray) -> list[tuple[Scene | None, str]]:
    """What is seen in images [n, S, S, 3]: the scene and its caption.

    The scene is None where there are not one or two things, then the text says how many, and where
    a thing is not of one colour, then the text calls it 'mottled'.
    """
    images = np.asarray(images)
    _check(config, images)
    seen = _look(config, images)
    colours = (*COLOURS, 'mottled')  # the last one is index -1
    readings = []
    for i, count in enumerate(seen.count.tolist()):
        background = list(BACKGROUNDS)[seen.background[i]]
        if count not in (1, 2):
            readings.append((None, f'{count or "no"} things on a {background} background'))
            continue
        things = tuple(Thing(SIZES[size], colours[colour], SHAPES[shape])
                       for size, colour, shape in seen.things[i, :count])
        relation = RELATIONS[seen.relation[i]] if count == 2 else ''
        scene = Scene(things, relation, background)
        plain = (seen.things[i, :count, 1] >= 0).all()
        readings.append((scene if plain else None, caption(scene)))
    return readings


def _check(config: SceneConfig, images: np.ndarray) -> None:
    if images.ndim != 4 or not len(images) or images.shape[1:] != (config.size, config.size, 3):
        raise ValueError(f'images of shape {images.shape} are not [n >= 1, '
                         f'{config.size}, {config.size}, 3], as scenes of this setting are')
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f'images of dtype {images.dtype} are neither uint8 nor floating point')
    if images.dtype != np.uint8 and images.max() > 2:
        raise ValueError(f'floating point images reach {images.max():.3g}; divide them so that '
                         'white is 1')


def _look(config: SceneConfig, images: np.ndarray) -> _Seen:
    """Reads all images, a chunk at a time."""
    chunks = [_look_at_chunk(config, images[start:start + CHUNK])
              for start in range(0, len(images), CHUNK)]
    return _Seen(*(np.concatenate(parts) for parts in zip(*chunks)))


def _look_at_chunk(config: SceneConfig, images: np.ndarray) -> _Seen:
    n = len(images)
    grounds = np.array(list(BACKGROUNDS.values())[:config.backgrounds], np.float32) / 255
    colours = np.array(list(COLOURS.values())[:config.colours], np.float32) / 255
    images = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    background = _nearest(np.median(border, 1), grounds)
    ground = grounds[background]
    count, owner, slot, masks = _things(_norm(images - ground[:, None, None]) > CONTRAST)

    # Windows about the things' centres, and masks of their own pixels there.
    axis = np.arange(config.size)
    centres = np.stack([masks.sum(1) @ axis, masks.sum(2) @ axis], 1)  # [m, (x, y)]
    centres = centres / masks.sum((1, 2))[:, None]
    left, top = np.floor(centres + 0.5).astype(int).T
    templates = _templates(config.size)
    half = templates.shape[-1] // 2
    pad, window = ((0, 0), (half, half), (half, half)), (2 * half + 1, 2 * half + 1)
    views = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, (*pad, (0, 0))), window, (1, 2))[owner, top, left]  # [m, 3, W, W]
    masks = np.lib.stride_tricks.sliding_window_view(
        np.pad(masks, pad), window, (1, 2))[np.arange(len(owner)), top, left]  # [m, W, W]

    interior = masks & ~_spread(~masks)
    thin = ~interior.any((1, 2))
    interior[thin] = masks[thin]
    colour = _nearest(_masked_median(views, interior), colours)
    ink, line = colours[colour], ground[owner] - colours[colour]  # [m, 3]
    mixed = _off_line(views, ink, line) > _norm(
        views[:, None] - colours[:, :, None, None], 2).min(1)
    mottled = (mixed & interior).sum((1, 2)) > MAX_MIXED * interior.sum((1, 2))
    # 1 where a pixel has the colour, 0 for the background, linear in between; less for others.
    cover = 1 - _norm(views - ink[:, :, None, None], 1) / _norm(line)[:, None, None]
    cover = np.clip(cover, 0, 1) * _spread(masks)
    overlap = _overlap(cover, templates)  # [m, kinds]

    seen = _Seen(background, count, np.full((n, 2, 3), -1), np.full(n, -1),
                 np.zeros((n, 2), np.float32))
    size, shape = np.divmod(overlap.argmax(1), len(SHAPES))
    seen.things[owner, slot] = np.stack([size, np.where(mottled, -1, colour), shape], 1)
    seen.quality[owner, slot] = overlap.max(1)
    second = np.flatnonzero(slot == 1)  # its first stands right before it
    x, y = (centres[second] - centres[second - 1]).T
    seen.relation[owner[second]] = np.where(
        abs(x) >= abs(y), np.where(x > 0, 0, 2), np.where(y > 0, 1, 3))
    return seen


def _things(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The regions of at least MIN_AREA in masks [n, S, S].

    Returns:
      Their number in each image [n], and the one or two largest of every image: m of them, as
      index of the image [m], slot 0 or 1 [m] in order of area, mask [m, S, S].
    """
    labels = _regions(mask)
    n, pixels = len(mask), mask[0].size
    numbers = labels.reshape(n, -1) + (pixels + 1) * np.arange(n)[:, None]
    areas = np.bincount(numbers.ravel(), minlength=n * (pixels + 1)).reshape(n, pixels + 1)
    areas[:, 0] = 0  # label 0 is the background
    areas[areas < MIN_AREA * pixels] = 0
    largest = np.argsort(-areas, axis=1, kind='stable')[:, :2]
    owner, slot = np.nonzero(np.take_along_axis(areas, largest, 1))
    return (areas > 0).sum(1), owner, slot, labels[owner] == largest[owner, slot, None, None]


def _norm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.sqrt(np.square(x).sum(axis))


def _nearest(x: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Indices [...] of the colours of a palette [k, 3] nearest to x [..., 3]."""
    return _norm(x[..., None, :] - palette).argmin(-1)


def _off_line(views: np.ndarray, start: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Distance of views [m, 3, W, W] from the segments start to start + line, [m, 3] each."""
    start, line = start[:, :, None, None], line[:, :, None, None]
    share = ((views - start) * line).sum(1, keepdims=True) / np.square(line).sum(1, keepdims=True)
    return _norm(views - start - np.clip(share, 0, 1) * line, 1)


def _spread(x: np.ndarray) -> np.ndarray:
    """The largest value in the 3 x 3 neighbourhood of every pixel of [n, H, W]."""
    rows = x.copy()
    np.maximum(rows[:, 1:], x[:, :-1], out=rows[:, 1:])
    np.maximum(rows[:, :-1], x[:, 1:], out=rows[:, :-1])
    out = rows.copy()
    np.maximum(out[:, :, 1:], rows[:, :, :-1], out=out[:, :, 1:])
    np.maximum(out[:, :, :-1], rows[:, :, 1:], out=out[:, :, :-1])
    return out


def _regions(mask: np.ndarray) -> np.ndarray:
    """Labels the 8-connected regions of masks [n, H, W]: int32, equal within a region, else 0.

    Every pixel points to the one its label numbers, in the same region. Taking the largest pointer
    of the neighbours and then following it once doubles the reach of a step.
    """
    n, height, width = mask.shape
    numbers = np.arange(1, height * width + 1, dtype=np.int32).reshape(1, height, width)
    labels = np.where(mask, numbers, 0)
    follow = np.zeros((n, height * width + 1), np.int32)
    while True:
        follow[:, 1:] = np.where(mask, _spread(labels), 0).reshape(n, -1)
        further = np.take_along_axis(follow, follow[:, 1:], 1).reshape(mask.shape)
        if np.array_equal(further, labels):
            return labels
        labels = further


def _masked_median(views: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The median of views [m, 3, W, W] over pixels of non-empty masks [m, W, W]: [m, 3]."""
    m, _, height, width = views.shape
    values = np.where(masks[:, None], views, np.inf).reshape(m, 3, height * width)
    middle = masks.sum((1, 2))[:, None, None] // 2
    return np.take_along_axis(np.sort(values, -1), middle, -1)[..., 0]


def _overlap(cover: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Largest intersection over union of cover [m, W, W] with each kind of thing: [m, kinds].

    For partial cover the intersection is the sum of the smaller values, the union of the larger.
    """
    kinds, shifts, height, width = templates.shape
    templates = templates.reshape(kinds * shifts, height * width)
    cover = cover.reshape(len(cover), height * width)
    both = np.empty((kinds * shifts, len(cover)), np.float32)
    smaller = np.empty_like(cover)
    for i, template in enumerate(templates):
        np.minimum(cover, template, out=smaller).sum(1, out=both[i])
    union = cover.sum(1) + templates.sum(1)[:, None] - both
    return (both / union).reshape(kinds, shifts, len(cover)).max(1).T


@functools.cache
def _templates(side: int) -> np.ndarray:
    """Cover of every kind of thing at sub-pixel shifts: float32 [sizes * shapes, shifts, W, W].

    The thing's centre of mass is the window's centre pixel's, shifted by odd eighths of a pixel
    either way. Cover is the share of SUBSAMPLES ** 2 points of a pixel that lie inside.
    """
    half = int(np.ceil(RADII[1] * side)) + 2
    axis = (np.arange(SUBSAMPLES * (2 * half + 1)) + 0.5) / SUBSAMPLES - half - 0.5
    pixel = (2 * half + 1, SUBSAMPLES)
    shifts = np.array((-3, -1, 1, 3)) / 8
    return np.array([
        [_inside(shape, (axis - dx)[None] / radius, (axis - dy)[:, None] / radius)
         .reshape(pixel + pixel).mean((1, 3)) for dy in shifts for dx in shifts]
        for radius in np.array(RADII) * side for shape in SHAPES], np.float32)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape of radius 1 about the origin, y down."""
    if shape in ('circle', 'ring'):
        squared = x * x + y * y
        return (squared <= 1) & (squared >= (RING_HOLE ** 2 if shape == 'ring' else 0))
    h, w = SQUARE_HALF_SIDE, CROSS_HALF_WIDTH
    corners = {
        'square': [(-h, -h), (h, -h), (h, h), (-h, h)],
        'triangle': _around((1, 1, 1)),
        'cross': [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w),
                  (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)],
        'star': _around((1, STAR_NOTCH) * 5),
    }[shape]
    # A ray from an inside point to the right crosses the outline an odd number of times.
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0)):
        if y0 != y1:
            crosses = ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
            inside ^= crosses
    return inside


def _around(radii: Sequence[float]) -> np.ndarray:
    """Corners at equal angles about the origin, the first one straight up: [k, (x, y)], y down."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * np.array(radii)[:, None]
