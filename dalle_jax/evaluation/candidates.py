"""Candidates of many captions: drawn once, kept as tokens, looked at in many ways.

Of every candidate of every caption its tokens (2 KB for 32 x 32), its log-likelihood and CLIP's
score are written as they are drawn, in files of thousands; a drawing that was stopped goes on
behind the last of them, in the same batches. Which candidate is the best of the first N is a
question to the scores, so one drawing of 512 candidates answers for N = 1, 2, ..., 512. Where a
caption stands several times among the captions, its images are others each time.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle_jax import runs
from dalle_jax.generate import Model, Sampling
from dalle_jax.progress import Images

IMAGES = 4096  # of a file


class Candidates(NamedTuple):
    """What is known of C captions with N candidates each.

    Attributes:
      directory: of the files with their tokens.
      logp: float32 [C, N], log-likelihood of the image tokens given the caption, nats.
      logp_text: float32 [C].
      scores: float32 [C, N], CLIP's, or None without a CLIP.
    """

    directory: Path
    logp: np.ndarray
    logp_text: np.ndarray
    scores: np.ndarray | None

    def best_of(self, n: int) -> np.ndarray:
        """int [C], index of the best of the first n candidates: by CLIP, or else by likelihood."""
        found = self.logp if self.scores is None else self.scores
        return np.argmax(found[:, :n], axis=1)

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        """int32 [C, h, w], the tokens of one candidate of each caption, or with chosen [C, k] of
        several: [C, k, h, w]."""
        found = []
        shard = shard_size(self.logp.shape[1])
        for begin in range(0, len(chosen), shard):
            part = chosen[begin:begin + shard]
            rows = np.arange(len(part)).reshape(-1, *(1,) * (part.ndim - 1))
            ids = runs.read_arrays(_file(self.directory, begin), 'ids')['ids']
            found.append(ids[rows, part].astype(np.int32))
        return np.concatenate(found)


def shard_size(candidates: int) -> int:
    """Captions of a file."""
    return max(1, IMAGES // candidates)


def draw(model: Model, captions: Sequence[str], sampling: Sampling, directory: Path, name: str
         ) -> Candidates:
    """Draws what is not there yet, and reads all.

    Args:
      sampling: with a batch, see Model.fit: what is continued must be drawn in the same batches.
      name: what the console calls it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shard = shard_size(sampling.candidates)
    start = _complete(directory, len(captions), shard)
    if start:
        runs.say(f'{name}: {start:,} of {len(captions):,} captions are drawn')
    rows, told = [], Images((len(captions) - start) * sampling.candidates, name)
    seen, firsts = Counter(), []
    for caption in captions:
        firsts.append(sampling.first + seen[caption] * sampling.candidates)
        seen[caption] += 1
    drawing = model.draw(captions, sampling, start=start, firsts=firsts, progress=told)
    for number, drawn in enumerate(drawing, start=start + 1):
        rows.append(drawn._replace(images=None))  # they are many times as large
        if number % shard == 0 or number == len(captions):
            _write(_file(directory, number - len(rows)), rows)
            rows = []
    return _read(directory, len(captions), shard)


def _file(directory, begin):
    return directory / f'{begin:06}.npz'


def _complete(directory, captions, shard):
    """How many captions are drawn: whole files from the first on."""
    begin = 0
    while begin < captions and _file(directory, begin).exists():
        begin = min(begin + shard, captions)
    return begin


def _write(path, rows):
    arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in ('ids', 'logp')}
    arrays['ids'] = arrays['ids'].astype(np.uint16)
    arrays['logp_text'] = np.array([row.logp_text for row in rows], np.float32)
    if rows[0].scores is not None:
        arrays['scores'] = np.stack([row.scores for row in rows])
    runs.write_arrays(path, arrays)


def _read(directory, captions, shard):
    parts = []
    for begin in range(0, captions, shard):
        parts.append(runs.read_arrays(_file(directory, begin), 'logp', 'logp_text', 'scores'))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Candidates(directory, found['logp'], found['logp_text'], found.get('scores'))
