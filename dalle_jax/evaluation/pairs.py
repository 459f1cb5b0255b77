"""The captions that are evaluated, and the real images that belong to them.

Chosen once, by a seed, and written down with a hash, so that another evaluation can take the same.
"""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.data import images as images_lib
from dalle_jax.data.pipeline import Prefetch
from dalle_jax.data.records import BadRecord

EXAMPLES = 20  # bad records that are told
PARTS = 128  # images at a time


class Pairs(NamedTuple):
    """Captions and where their images are.

    Attributes:
      ids: of each caption: name of its record, '#', number of the caption in it.
      captions: as in the data.
      records: index of each caption's record in the source.
      images: digest of each caption's image.
      left_out: why records could not be used, the first of them.
      left_out_count: how many of them.
      excluded: how many were left out by their names.
    """

    ids: tuple[str, ...]
    captions: tuple[str, ...]
    records: tuple[int, ...]
    images: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    left_out_count: int = 0
    excluded: int = 0

    @property
    def hash(self) -> str:
        """Of ids and captions, in their order."""
        return short_hash('\n'.join(f'{i}\t{caption}'
                                    for i, caption in zip(self.ids, self.captions)).encode())

    @property
    def images_hash(self) -> str:
        """Of the images, in their order."""
        return short_hash(' '.join(self.images).encode())


def choose(source: Any, count: int, seed: int, crop: str, size: int,
           exclude: Container[str] = (), say: Callable[[str], None] = print) -> Pairs:
    """Captions of a source, at random and without repetition.

    Args:
      source: of records, see data/records.py.
      count: captions wanted; 0: all that differ, in the order of the records (as of CUB in Ramesh
        et al. 2021, sec. 3.1).
      seed: of the choice.
      crop, size: how images are brought to size; those that cannot be are left out with their
        captions.
      exclude: names of records that are left out.
      say: is told now and then how far it is: the image of every record is decoded.

    Raises:
      ValueError: there are fewer usable captions.
    """
    problems, found, excluded = [], {}, 0
    pairs = [(i, k) for i in range(len(source)) for k in range(_captions(source, i, problems))]
    if count:
        pairs = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    if len(pairs) < max(count, 1):
        raise ValueError(f'there are {len(pairs)} captions of {len(source)} records, and '
                         f'{count or "some"} are asked for; ask for fewer, or name more splits')
    order = list(dict.fromkeys(i for i, _ in pairs))
    looked_at = itertools.chain.from_iterable(in_threads(
        lambda n: _look(source, order[n], crop, size), len(order)))
    chosen, seen, told = [], set(), time.monotonic()
    for i, k in pairs:
        if count and len(chosen) == count:
            break
        if time.monotonic() - told > 5:
            say(f'{len(chosen):,}/{count or len(pairs):,} captions chosen')
            told = time.monotonic()
        if i not in found:
            found[i] = look = next(looked_at)
            if isinstance(look, str):
                problems.append(look)
                found[i] = None
            elif look[0] in exclude:
                excluded, found[i] = excluded + 1, None
        if not found[i]:
            continue
        name, captions, digest = found[i]
        if count or captions[k] not in seen:
            seen.add(captions[k])
            chosen.append((f'{name}#{k}', captions[k], i, digest))
    if len(chosen) < max(count, 1):
        raise ValueError(f'{len(chosen)} captions can be used, and {count or "some"} are asked '
                         f'for; {len(problems)} records are left out, and {excluded} excluded'
                         + ''.join(f'\n  {why}' for why in problems[:4]))
    return Pairs(*zip(*chosen), tuple(problems[:EXAMPLES]), len(problems), excluded)


def _captions(source, i, problems):
    """How many captions a record has."""
    of_record = getattr(source, 'captions', lambda i: source[i].captions)
    try:
        return len(of_record(i))
    except BadRecord as error:
        problems.append(str(error))
        return 0


def _look(source, i, crop, size):
    """(name, captions, digest of the image), or why a record cannot be used."""
    try:
        record = source[i]
        return record.name, record.captions, short_hash(_cut(record, crop, size).tobytes())
    except BadRecord as error:
        return str(error)


def real_image(source: Any, pairs: Pairs, n: int, crop: str, size: int) -> np.ndarray:
    """The image of caption n, uint8 [size, size, 3].

    Raises:
      ValueError: it is another one than when the captions were chosen.
      BadRecord: it cannot be used any more.
    """
    record = source[pairs.records[n]]
    image, name = _cut(record, crop, size), pairs.ids[n].rpartition('#')[0]
    if record.name != name or short_hash(image.tobytes()) != pairs.images[n]:
        raise ValueError(f'the data have changed since captions were chosen: the image of {name} '
                         f'is now another one ({record.name}); give another --workdir')
    return image


def short_hash(data: bytes) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:16]


def _cut(record, crop, size):
    image = images_lib.decode(record.image, record.name)
    # 'center' and 'none' draw no random numbers.
    return images_lib.crop(crop, image, size, np.random.default_rng(0), record.name)


def in_threads(function: Callable[[int], Any], count: int) -> Iterator[list]:
    """function(i) for i < count, PARTS at a time and in order, made ahead by a thread for each CPU.

    An error is raised where its part would have come.
    """
    workers = os.cpu_count()
    with Prefetch(_Parts(function, count), 0, -(-count // PARTS), 1, workers, workers + 1) as made:
        for _, part in made:
            yield part


class _Parts(NamedTuple):
    """As Prefetch asks for its batches."""

    function: Callable[[int], Any]
    count: int

    def batch(self, number):
        begin = number * PARTS
        return [self.function(i) for i in range(begin, min(begin + PARTS, self.count))]
