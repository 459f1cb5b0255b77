"""Batches as a pure function of (seed, step): nothing to save, nothing to replay on resuming.

Step `s` of batch size B fills positions s B to (s + 1) B - 1 of an endless stream. Position p is
record permutation(p mod N) of epoch p // N, where every epoch permutes the N records anew, and all
that is random about it (caption, BPE dropout, crop, in this order) is drawn by a generator seeded
with (seed, p). So a batch does not depend on the steps before it, on the number of threads, or on
how many processes share it: process i of n computes rows i B / n to (i + 1) B / n - 1.

A bad record (see `records`) is replaced by the one that a hash of (seed, p, attempt) picks, which
keeps the batch a function of seed, step and bytes; `Pipeline.problems` counts and names them.

Letters: B batch size over all processes, b = B / n rows of this process, N records, S image side,
T text length, p position.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dalle_jax.data import images
from dalle_jax.data.records import BadRecord, Record, Source
from dalle_jax.data.text import Tokenizer

ATTEMPTS = 16
EXAMPLES = 20
ROUNDS = 8

Batch = dict[str, np.ndarray]


@dataclasses.dataclass
class Problems:
    """What a pipeline met so far in the batches it has made.

    Attributes:
      replaced: bad records that were replaced; one that comes up twice counts twice.
      truncated: captions that had more tokens than fit.
      examples: the first different messages about bad records, at most 20.
    """

    replaced: int = 0
    truncated: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f'{self.replaced} bad records replaced, {self.truncated} captions truncated']
        return '\n  '.join(lines + self.examples)


class Pipeline:
    """Makes the batches of one source. Safe to call from several threads.

    Attributes:
      problems: what went wrong so far, in this process.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int,
                 image_size: int | None = None, text_length: int | None = None,
                 tokenizer: Tokenizer | None = None, grid: tuple[int, int] | None = None,
                 crop: str = 'none', bpe_dropout: float = 0.0, shuffle: bool = True,
                 rows: Sequence[int] | None = None):
        """Raises ValueError on arguments that contradict each other.

        Args:
          source: the records.
          batch_size: rows of a batch over all processes.
          seed: chooses the order and everything that is random about a record.
          image_size: S, which gives batches an 'image'.
          text_length: T, which gives batches a 'text'; needs `tokenizer`.
          tokenizer: encodes captions.
          grid: (h, w), which gives batches 'codes'; the source has such records (TokenSource).
          crop: how images become S x S, one of images.CROPS.
          bpe_dropout: probability of dropping a merge.
          shuffle: whether epochs are permuted; without, records come in order, again and again.
          rows: which rows of a batch this process makes; None: all.
        """
        if seed < 0:
            raise ValueError(f'seed {seed} is negative')
        if not len(source):
            raise ValueError('the source has no records')
        rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        if batch_size < 1 or not len(rows):
            raise ValueError(f'batch_size {batch_size} and {len(rows)} rows of it: each must be at '
                             'least 1')
        if rows.min() < 0 or rows.max() >= batch_size:
            raise ValueError(f'rows {rows.min()} to {rows.max()} are not all in a batch of '
                             f'{batch_size}')
        if not image_size and not text_length and not grid:
            raise ValueError('a batch needs grid or image_size, text_length or both')
        if text_length and tokenizer is None:
            raise ValueError(f'text_length {text_length} needs a tokenizer')
        if crop not in images.CROPS:
            raise ValueError(f'crop {crop!r} is none of {", ".join(images.CROPS)}')
        self._source = source
        # A source that makes many records at once more cheaply, and none of them bad, says so.
        self._records = getattr(source, 'records', None)
        self._batch_size = batch_size
        self._seed = seed
        self._image_size = image_size
        self._text_length = text_length
        self._tokenizer = tokenizer
        self._grid = grid
        self._crop = crop
        self._bpe_dropout = bpe_dropout
        self._shuffle = shuffle
        self._rows = rows
        self._lock = threading.Lock()
        self.problems = Problems()

    def batch(self, step: int) -> Batch:
        """This process's rows of a step: 'image' uint8 [b, S, S, 3] or 'codes' int32 [b, h, w], and
        'text' int32 [b, T].

        Only what the pipeline was asked for is there. Raises RuntimeError where 16 records in a row
        are bad; any other error of the source is passed on.
        """
        positions = step * self._batch_size + self._rows
        epochs, indices = np.divmod(positions, len(self._source))
        if self._shuffle:
            indices = permute(indices, epochs, len(self._source), self._seed)
        batch = {}
        if self._image_size:
            side = self._image_size
            batch['image'] = np.empty((len(positions), side, side, 3), np.uint8)
        if self._grid:
            batch['codes'] = np.empty((len(positions), *self._grid), np.int32)
        if self._text_length:
            batch['text'] = np.zeros((len(positions), self._text_length), np.int32)
        records = self._records(indices) if self._records else [None] * len(indices)
        for row, (position, index) in enumerate(zip(positions.tolist(), indices.tolist())):
            for name, value in self._example(position, index, records[row]).items():
                batch[name][row] = value
        return batch

    def prefetch(self, start: int = 0, stop: int | None = None, *, group: int = 1,
                 workers: int = 2, depth: int | None = None) -> 'Prefetch':
        """Iterates over (step, batch) from `start` up to `stop` (None: for ever), made ahead.

        Args:
          start, stop: the steps.
          group: K > 1 stacks the batches of K consecutive steps on a new leading axis, for a train
            step that scans over them; they come with the first of their steps.
          workers: threads.
          depth: how many groups are under way ahead of the consumer; default workers + 1.
        """
        depth = workers + 1 if depth is None else depth
        if min(group, workers, depth) < 1:
            raise ValueError(f'group {group}, workers {workers} and depth {depth} must be positive')
        if stop is not None and (stop - start) % group:
            raise ValueError(f'steps {start} to {stop} do not divide into groups of {group}')
        return Prefetch(self, start, stop, group, workers, depth)

    def _example(self, position: int, index: int, record: Record | None) -> Batch:
        """The arrays of one row; where its record is bad, of another one in its place."""
        reasons = []
        for attempt in range(ATTEMPTS):
            if attempt:
                index = int(_hash(self._seed, position, attempt)[0] % len(self._source))
                record = None
            rng = np.random.default_rng((self._seed, position, attempt))
            try:
                return self._prepare(record or self._source[index], rng)
            except BadRecord as error:
                reasons.append(str(error))
                self._note_bad(str(error))
        raise RuntimeError(
            f'{ATTEMPTS} records in a row are bad ({self.problems.replaced} bad ones so far, of '
            f'{len(self._source)} in the source); the last ones:\n  ' + '\n  '.join(reasons[-4:]))

    def _prepare(self, record: Record, rng: np.random.Generator) -> Batch:
        example = {}
        if self._text_length:
            if not record.captions:
                raise BadRecord(f'{record.name}: no captions')
            caption = record.captions[rng.integers(len(record.captions))]
            try:
                text, truncated = self._tokenizer.batch(
                    [caption], self._text_length, self._bpe_dropout, rng)
            except BadRecord as error:
                raise BadRecord(f'{record.name}: {error}') from error
            example['text'] = text[0]
            with self._lock:
                self.problems.truncated += truncated
        if self._image_size:
            image = images.decode(record.image, record.name)
            example['image'] = images.crop(self._crop, image, self._image_size, rng, record.name)
        if self._grid:
            example['codes'] = record.codes[rng.integers(len(record.codes))]
        return example

    def _note_bad(self, message: str) -> None:
        with self._lock:
            self.problems.replaced += 1
            if len(self.problems.examples) < EXAMPLES and message not in self.problems.examples:
                self.problems.examples.append(message)


class Prefetch:
    """An iterator over (step, batch) whose batches threads make ahead of time.

    An error while making a batch is raised where that batch would have come. Abandoning the
    iterator stops the threads, and so does leaving it as a context manager.

    Attributes:
      wait_seconds: time the consumer has spent waiting for batches so far.
    """

    def __init__(self, pipeline: Pipeline, start: int, stop: int | None, group: int, workers: int,
                 depth: int):
        self.wait_seconds = 0.0
        self._pipeline = pipeline
        self._next, self._stop, self._group, self._depth = start, stop, group, depth
        self._pool = ThreadPoolExecutor(workers, 'batches')
        self._pending = deque()

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        while len(self._pending) < self._depth and (self._stop is None or self._next < self._stop):
            # Not a method of this object: a task must not keep an abandoned iterator alive.
            task = self._pool.submit(_stack, self._pipeline, self._next, self._group)
            self._pending.append((self._next, task))
            self._next += self._group
        if not self._pending:
            self.close()
            raise StopIteration
        step, task = self._pending.popleft()
        begin = time.perf_counter()
        try:
            return step, task.result()
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - begin

    def __enter__(self) -> 'Prefetch':
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __del__(self):
        self.close()

    def close(self) -> None:
        """Ends the iteration: drops the batches made ahead and lets the threads finish."""
        self._stop = self._next
        self._pending.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _stack(pipeline: Pipeline, start: int, group: int) -> Batch:
    batches = [pipeline.batch(step) for step in range(start, start + group)]
    if group == 1:
        return batches[0]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def permute(indices: np.ndarray, epochs: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Where each epoch's permutation of range(length) sends the indices; O(1) memory.

    A Feistel network permutes the next larger power of two, and walking along its cycles until a
    value below `length` appears permutes range(length) (Black and Rogaway 2002, cycle walking).

    Args:
      indices: integers in [0, length), any shape [n].
      epochs: integers [n], the epoch of each index.
      length: N >= 1.
      seed: chooses the permutations.

    Returns:
      int64 [n], for every epoch a bijection.
    """
    bits = max(int(length - 1).bit_length(), 6)  # on fewer, far from all orders are likely
    high, low = bits // 2, bits - bits // 2
    keys = [_hash(seed, epochs, r) for r in range(ROUNDS)]
    values = np.array(indices, np.uint64)
    walking = np.arange(values.size)
    while walking.size:
        x = values[walking]
        left, right = x >> low, x & (2**low - 1)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key[walking]) & (2**high - 1))
            high, low = low, high
        values[walking] = left << low | right
        walking = walking[values[walking] >= length]
    return values.astype(np.int64)


def _hash(*values: int | np.ndarray) -> np.ndarray:
    """Folds integers into one uint64 [n]; n = 1 where all are scalars."""
    folded = np.zeros(1, np.uint64)
    for value in values:
        folded = _mix(folded ^ np.asarray(value).astype(np.uint64))
    return folded


def _mix(x: np.ndarray) -> np.ndarray:
    """One step of splitmix64 (Steele et al. 2014), a bijection of uint64 [n] that wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> 27) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> 31
