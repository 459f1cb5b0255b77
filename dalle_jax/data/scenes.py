"""Captioned scenes of one or two coloured shapes, drawn on demand: data for when there is none.

    a small red circle left of a large blue star on a white background

A scene is what the caption says: a background, one or two things (size, colour, shape) and the
relation between them. Where exactly the things lie is drawn anew for each record. 'A above B' and
'B below A' are the same scene, and the splits hold out scenes, so neither wording leaks the other:

    pairs    scenes with a colour-shape pair that no training caption has (HELD_OUT)
    combos   a tenth of the other scenes of two things: known pairs in a new combination
    train    all the rest
    any      every scene; for the image tokenizer, which sees no captions

Everything about record i follows from (config, split, seed, i) through an integer hash; there is
no random generator, no state and no file. `scenes_oracle` reads images back.

Letters: S image side in pixels, n images, m things of a group, W side of a thing's box.
"""

import cmath
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dalle_jax.data.records import Record

SIZES = ('small', 'large')
SHAPES = ('circle', 'square', 'triangle', 'cross', 'ring', 'star')
COLOURS = {  # a setting uses the first few; any two differ by more than a third of the range
    'red': (215, 35, 45), 'green': (40, 165, 65), 'blue': (35, 85, 225),
    'yellow': (250, 220, 45), 'purple': (125, 30, 175), 'orange': (240, 120, 20),
    'cyan': (30, 205, 215), 'pink': (255, 155, 205),
}
BACKGROUNDS = {'white': (255, 255, 255), 'black': (0, 0, 0), 'grey': (145, 145, 145)}
RELATIONS = ('left of', 'above', 'right of', 'below')  # the opposite of r is (r + 2) % 4
SYNONYMS = {
    'small': 'little', 'large': 'big', 'above': 'over', 'below': 'under',
    'left of': 'to the left of', 'right of': 'to the right of',
}
SPLITS = ('train', 'combos', 'pairs', 'any')
MAX_TEMPLATES = 4

# A colour loses at most one shape and a shape at most two colours; with c colours the first c - 1.
HELD_OUT = (
    ('red', 'triangle'), ('green', 'square'), ('blue', 'circle'), ('yellow', 'star'),
    ('purple', 'ring'), ('orange', 'cross'), ('cyan', 'triangle'),
)

RADII = (8.5 / 64, 13 / 64)  # of SIZES, as fractions of S
# Proportions, as fractions of a thing's radius.
SQUARE_HALF_SIDE = 0.84
CROSS_HALF_WIDTH = 0.34
RING_HOLE = 0.55
STAR_NOTCH = 0.46

SINGLE_SHARE = 0.2  # of the records show one thing
CHUNK = 128  # images drawn at once: the temporaries stay in cache

_SINGLE = 4  # stands in the relation column of a scene of one thing
_COLOUR_NAMES = tuple(COLOURS)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_COLOUR_RGB = np.array(list(COLOURS.values()), np.float32)
_BACKGROUND_RGB = np.array(list(BACKGROUNDS.values()), np.float32)
_STEPS = np.arange(1024, dtype=np.float32)
_DRAWS = np.arange(1, 12, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """How varied the scenes are.

    Attributes:
      size: image side S in pixels, >= 32.
      colours: how many of COLOURS, 2 to 8.
      backgrounds: how many of BACKGROUNDS, 1 to 3.
      templates: phrasings of every caption, 1 to 4: as above, the things in reverse order, and
        both again with synonyms and the background in front.
      freedom: things lie within +- freedom * S of an anchor, uniformly, as far as there is room;
        0 puts them on the anchors and 1 anywhere.
      token: the pitch in pixels of anchors across the relation's axis (-1, 0 or 1 pitches from
        the centre); the side of an image token makes scenes that a tokenizer finds regular.
    """

    size: int = 60
    colours: int = 6
    backgrounds: int = 2
    templates: int = 1
    freedom: float = 1 / 64
    token: int = 6

    def __post_init__(self):
        room = self.size / 2 - RADII[1] * self.size - self.margin
        for name, low, high in (
                ('size', 32, 1024), ('colours', 2, len(COLOURS)), ('token', 0, int(room)),
                ('backgrounds', 1, len(BACKGROUNDS)), ('templates', 1, MAX_TEMPLATES)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(
                    f'scenes: {name}={value!r} must be an integer from {low} to {high}'
                    + (f' (what fits an image of {self.size} px)' if name == 'token' else ''))
        if not 0 <= self.freedom <= 1:
            raise ValueError(f'scenes: freedom={self.freedom!r} must be in [0, 1], a share of size')

    @property
    def margin(self) -> float:
        """Pixels kept free between a thing and the image's edge."""
        return max(1.0, self.size / 64)

    @property
    def gap(self) -> float:
        """Pixels kept free between two things; at 3 their boxes share no pixel."""
        return max(3.0, self.size / 16)


class Thing(NamedTuple):
    """A coloured shape, in words."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """What a caption says: one thing and relation '', or two and one of RELATIONS."""

    things: tuple[Thing, ...]
    relation: str
    background: str


def opposite(relation: str) -> str:
    """'below' for 'above' and so on."""
    return RELATIONS[(RELATIONS.index(relation) + 2) % 4]


def canonical(scene: Scene) -> Scene:
    """The same scene told from the left or from above; equal exactly for equal scenes."""
    if scene.relation in RELATIONS[2:]:
        return Scene(scene.things[::-1], opposite(scene.relation), scene.background)
    return scene


def caption(scene: Scene, template: int = 0) -> str:
    """One of the MAX_TEMPLATES phrasings of a scene, all different."""
    things, relation = scene.things, scene.relation
    background_first = template // 2
    if len(things) == 1:
        background_first = template % 2
    elif template % 2:
        things, relation = things[::-1], opposite(relation)
    phrases = [' '.join(thing) for thing in things]
    if template >= 2:
        phrases = [' '.join((SYNONYMS[thing.size], *thing[1:])) for thing in things]
        relation = SYNONYMS.get(relation, relation)
    told = 'a ' + f' {relation} a '.join(phrases)
    place = f'on a {scene.background} background'
    return f'{place}, {told}' if background_first else f'{told} {place}'


@functools.cache
def _grammar() -> tuple[re.Pattern, dict[str, str]]:
    meaning = {synonym: word for word, synonym in SYNONYMS.items()}
    meaning |= {word: word for word in (*SIZES, *RELATIONS)}
    sizes = '|'.join(word for word in meaning if meaning[word] in SIZES)
    relations = '|'.join(word for word in meaning if meaning[word] in RELATIONS)
    thing = f'a ({sizes}) ({"|".join(COLOURS)}) ({"|".join(SHAPES)})'
    place = f'on a ({"|".join(BACKGROUNDS)}) background'
    return re.compile(f'(?:{place}, )?{thing}(?: ({relations}) {thing})?(?: {place})?'), meaning


def parse(text: str) -> Scene:
    """The scene a caption tells, things in the caption's order, for every template.

    Raises:
      ValueError: the text is no caption of a scene.
    """
    pattern, meaning = _grammar()
    match = pattern.fullmatch(' '.join(text.lower().split()))
    if match is None or (match[1] is None) == (match[9] is None):
        raise ValueError(f'not a caption of a scene: {text!r}; one is '
                         "'a small red circle above a large blue star on a white background'")
    things = [Thing(meaning[match[2]], match[3], match[4])]
    if match[5]:
        things.append(Thing(meaning[match[6]], match[7], match[8]))
    return Scene(tuple(things), meaning[match[5]] if match[5] else '', match[1] or match[9])


# Below, scenes are rows (background, relation, size, colour, shape, size, colour, shape)
# of indices into the word lists, canonical: the relation is 0, 1 or _SINGLE.

def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that scatters neighbours: the finaliser of SplitMix64 (Steele 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def _table(colours: int, backgrounds: int, split: str) -> tuple[np.ndarray, int]:
    """The split's scenes, int64 [k, 8], those of one thing first, and how many these are."""
    things = np.indices((len(SIZES), colours, len(SHAPES))).reshape(3, -1).T
    b, one = np.indices((backgrounds, len(things))).reshape(2, -1)
    singles = np.column_stack([b, np.full_like(b, _SINGLE), things[one], 0 * things[one]])
    b, relation, one, two = np.indices((backgrounds, 2, len(things), len(things))).reshape(4, -1)
    rows = np.concatenate([singles, np.column_stack([b, relation, things[one], things[two]])])

    single = rows[:, 1] == _SINGLE
    held_out = np.zeros((colours, len(SHAPES)), bool)
    for colour, shape in HELD_OUT[:colours - 1]:
        held_out[_COLOUR_NAMES.index(colour), SHAPES.index(shape)] = True
    pairs = held_out[rows[:, 3], rows[:, 4]] | (held_out[rows[:, 6], rows[:, 7]] & ~single)
    # Eight columns of three bits: a scene hashes alike whatever the config.
    words = (rows << (3 * np.arange(8))).sum(1).astype(np.uint64)
    combos = ~pairs & ~single & (_mix(words) % np.uint64(10) == 0)
    members = {'pairs': pairs, 'combos': combos, 'train': ~pairs & ~combos,
               'any': np.ones(len(rows), bool)}[split]
    return rows[members], int((single & members).sum())


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A source of scenes: `[i]` is a Record whose image is uint8 [S, S, 3].

    A fifth of the records show one thing (none in 'combos'). The length only says where iteration
    ends: record i is the same at every length.
    """

    config: SceneConfig
    split: str
    length: int
    seed: int = 0

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f'scenes: no split {self.split!r}; there are {", ".join(SPLITS)}')
        if self.length < 1:
            raise ValueError(f'scenes: length={self.length!r} must be at least 1')
        if not 0 <= self.seed < 2 ** 60:
            raise ValueError(f'scenes: seed={self.seed!r} must be from 0 to 2**60 - 1')

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        return self.records([index])[0]

    def records(self, indices: Sequence[int] | np.ndarray) -> list[Record]:
        """Many records at a quarter of the cost of one by one."""
        rows, draws = self._draw(indices)
        images = _render(self.config, rows, _place(self.config, rows, draws))
        return [Record(image, self._captions(row, draw), f'scenes/{self.split}/{self.seed}/{index}')
                for image, row, draw, index in zip(images, rows.tolist(), draws, indices)]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of record `index`, without drawing it."""
        rows, draws = self._draw([index])
        return self._captions(rows[0].tolist(), draws[0])

    def scene(self, index: int) -> Scene:
        """What record `index` shows, in the words of its first caption."""
        return parse(self.caption(index))

    def caption(self, index: int) -> str:
        """The first caption of record `index`."""
        return self.captions(index)[0]

    def _captions(self, row: Sequence[int], draws: np.ndarray) -> tuple[str, ...]:
        scene = _scene(row, draws[2] < 0.5)
        return tuple(caption(scene, t) for t in range(self.config.templates))

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images of many records, uint8 [n, S, S, 3]; faster than one by one."""
        parts = [indices[start:start + CHUNK] for start in range(0, len(indices), CHUNK)]
        drawn = [self._draw(part) for part in parts]
        return np.concatenate([_render(self.config, rows, _place(self.config, rows, draws))
                               for rows, draws in drawn])

    def _draw(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The scenes of records, int64 [n, 8], and their random numbers, [n, 11] in [0, 1)."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.length:
            raise IndexError(f'scenes: no record {indices.tolist()} among {self.length}')
        stream = _mix(np.array([self.seed * len(SPLITS) + SPLITS.index(self.split)], np.uint64))
        record = _mix(stream + indices.astype(np.uint64))
        bits = _mix(record[:, None] + _DRAWS)
        draws = (bits >> np.uint64(11)) * 2.0 ** -53

        rows, singles = _table(self.config.colours, self.config.backgrounds, self.split)
        doubles = len(rows) - singles
        single = draws[:, 0] < (SINGLE_SHARE if singles else 0)
        row = np.where(single, draws[:, 1] * singles, singles + draws[:, 1] * doubles)
        return rows[row.astype(np.int64)], draws


def _scene(row: Sequence[int], reverse: bool) -> Scene:
    """A row in words, told from its other end if `reverse`."""
    background, relation, *words = row
    things = tuple(Thing(SIZES[s], _COLOUR_NAMES[c], SHAPES[f])
                   for s, c, f in (words[:3], words[3:]))
    background = _BACKGROUND_NAMES[background]
    if relation == _SINGLE:
        return Scene(things[:1], '', background)
    if reverse:
        return Scene(things[::-1], RELATIONS[relation + 2], background)
    return Scene(things, RELATIONS[relation], background)


def _place(config: SceneConfig, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Centres of the things in pixels, float64 [n, 2 things, (x, y)]; y points down.

    Along the relation's axis the anchors are the middles of the two halves, and a thing stays in
    its half; across it they are one token apart about the centre.
    """
    size = config.size
    radii = size * np.array(RADII)[rows[:, 2::3]]
    steps = np.floor(3 * draws[:, 3:7]).reshape(-1, 2, 2) - 1
    centres = size / 2 + config.token * steps  # [n, thing, (along, across)]
    low = np.broadcast_to((radii + config.margin)[..., None], centres.shape).copy()
    high = size - low
    double = rows[:, 1] != _SINGLE
    centres[double, :, 0] = size / 4, size * 3 / 4
    high[double, 0, 0] = (size - config.gap) / 2 - radii[double, 0]
    low[double, 1, 0] = (size + config.gap) / 2 + radii[double, 1]

    low = np.maximum(low, centres - config.freedom * size)
    high = np.minimum(high, centres + config.freedom * size)
    centres = low + (high - low) * draws[:, 7:11].reshape(-1, 2, 2)
    # Free positions could put the second thing further across than along, which nobody would
    # call 'left of'. Moving it towards the first never leaves the image.
    along = 0.8 * (centres[:, 1, 0] - centres[:, 0, 0])
    offset = centres[:, 1, 1] - centres[:, 0, 1]
    offset = np.where(double, np.minimum(np.maximum(offset, -along), along), offset)
    centres[:, 1, 1] = centres[:, 0, 1] + offset
    vertical = rows[:, 1] == 1
    centres[vertical] = centres[vertical, :, ::-1]
    return centres


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels to a shape's outline, negative inside; x, y broadcast, y down.

    Euclidean near straight edges and arcs, shorter outside corners; >= 0.5 half a pixel beyond r.
    """
    if shape in ('square', 'cross'):
        x, y = np.abs(x), np.abs(y)
        if shape == 'square':
            return np.maximum(x, y) - SQUARE_HALF_SIDE * r
        arm = CROSS_HALF_WIDTH * r
        return np.minimum(np.maximum(x - r, y - arm), np.maximum(x - arm, y - r))
    squared = x * x + y * y
    circle = np.sqrt(squared) - r
    if shape == 'circle':
        return circle
    if shape == 'ring':
        return np.maximum(circle, RING_HOLE * r - r - circle)
    x = np.abs(x)
    if shape == 'triangle':  # equilateral, tip up
        return np.maximum(np.maximum(math.sqrt(0.75) * x - 0.5 * y, y) - r / 2, circle)
    # A star of five points, one up: fold every point onto the nearest tip's axis.
    along = -y
    for angle in (0.4 * math.pi, 0.8 * math.pi):
        along = np.maximum(along, math.sin(angle) * x - math.cos(angle) * y)
    across = np.sqrt(np.maximum(squared - along * along, 0))
    notch = STAR_NOTCH * cmath.exp(0.2j * math.pi)
    edge = abs(1 - notch)
    star = notch.imag / edge * (along - r) + (1 - notch.real) / edge * across
    return np.maximum(star, circle)


def _render(config: SceneConfig, rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Draws scenes at given centres: uint8 [n, S, S, 3]. Each thing touches only its own box."""
    size = config.size
    images = np.empty((len(rows), size, size, 3), np.uint8)
    images[:] = _BACKGROUND_RGB[rows[:, 0], None, None].astype(np.uint8)
    double = np.flatnonzero(rows[:, 1] != _SINGLE)
    owner = np.concatenate([np.arange(len(rows)), double])
    things = np.concatenate([rows[:, 2:5], rows[double, 5:8]])
    centres = np.concatenate([centres[:, 0], centres[double, 1]])
    kind = things[:, 0] * len(SHAPES) + things[:, 2]
    for k in set(kind.tolist()):
        group = np.flatnonzero(kind == k)
        radius = RADII[k // len(SHAPES)] * size
        # All pixels whose centre is less than half a pixel outside the radius.
        side = int(2 * radius + 1) + 1
        corner = np.ceil(centres[group] - radius - 1).astype(np.int64)
        offset = (corner + 0.5 - centres[group]).astype(np.float32)[..., None] + _STEPS[:side]
        x, y = offset[:, 0, None, :], offset[:, 1, :, None]  # [m, 1, W], [m, W, 1]
        cover = np.clip(0.5 - _distance(SHAPES[k % len(SHAPES)], x, y, radius), 0, 1)[..., None]
        ground = _BACKGROUND_RGB[rows[owner[group], 0], None, None]
        ink = _COLOUR_RGB[things[group, 1], None, None]
        boxes = (ground + 0.5 + cover * (ink - ground)).astype(np.uint8)
        for box, image, (left, top) in zip(boxes, owner[group].tolist(), corner.tolist()):
            images[image, top:top + side, left:left + side] = box
    return images

