"""The captions that are evaluated, and the real images that belong to them.

Chosen once, by a seed, and written down with a hash, so that another evaluation can take the same.
"""

import hashlib
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.data import images as images_lib
from dalle_jax.data.records import BadRecord

EXAMPLES = 20  # bad records that are told


class Pairs(NamedTuple):
    """Captions and where their images are.

    Attributes:
      ids: of each caption: name of its record, '#', number of the caption in it.
      captions: as in the data.
      records: index of each caption's record in the source.
      left_out: why records could not be used, the first of them.
      left_out_count: how many of them.
    """

    ids: tuple[str, ...]
    captions: tuple[str, ...]
    records: tuple[int, ...]
    left_out: tuple[str, ...] = ()
    left_out_count: int = 0

    @property
    def hash(self) -> str:
        """Of ids and captions, in their order."""
        text = '\n'.join(f'{i}\t{caption}' for i, caption in zip(self.ids, self.captions))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


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
      say: is told now and then how far it is: every record's image is decoded.

    Raises:
      ValueError: there are fewer usable captions.
    """
    chooser = _Chooser(source, crop, size, exclude)
    pairs = [(i, k) for i in range(len(source)) for k in range(chooser.captions(i))]
    if count:
        pairs = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    chosen, seen, told = [], set(), time.monotonic()
    for i, k in pairs:
        if count and len(chosen) == count:
            break
        if time.monotonic() - told > 5:
            say(f'{len(chosen):,}/{count or len(pairs):,} captions chosen')
            told = time.monotonic()
        record = chooser.usable(i)
        if record is None or not count and record[1][k] in seen:
            continue
        seen.add(record[1][k])
        chosen.append((f'{record[0]}#{k}', record[1][k], i))
    if len(chosen) < max(count, 1):
        raise ValueError(f'{len(chosen)} captions can be used, and {count or "some"} are asked '
                         f'for; {len(chooser.problems)} records are left out'
                         + ''.join(f'\n  {why}' for why in list(chooser.problems.values())[:4]))
    ids, captions, records = zip(*chosen)
    problems = tuple(chooser.problems.values())
    return Pairs(ids, captions, records, problems[:EXAMPLES], len(problems))


class _Chooser:
    """Looks at records once each, and remembers those that cannot be used."""

    def __init__(self, source, crop, size, exclude):
        self._source, self._crop, self._size, self._exclude = source, crop, size, exclude
        self._usable, self.problems = {}, {}

    def captions(self, i):
        """How many captions a record has."""
        of_record = getattr(self._source, 'captions', lambda i: self._source[i].captions)
        try:
            return len(of_record(i))
        except BadRecord as error:
            self.problems[i] = str(error)
            return 0

    def usable(self, i):
        """(name, captions) of a record whose image can be used, or None."""
        if i not in self._usable:
            self._usable[i] = None
            try:
                record = self._source[i]
                _image(record, self._crop, self._size)
                if record.name not in self._exclude:
                    self._usable[i] = record.name, record.captions
            except BadRecord as error:
                self.problems[i] = str(error)
        return self._usable[i]


def real_images(source: Any, records: Sequence[int], crop: str, size: int) -> np.ndarray:
    """The images of records, uint8 [n, size, size, 3]."""
    return np.stack([_image(source[i], crop, size) for i in records])


def _image(record, crop, size):
    image = images_lib.decode(record.image, record.name)
    # 'center' and 'none' draw no random numbers.
    return images_lib.crop(crop, image, size, np.random.default_rng(0), record.name)
