"""Candidates of many captions: drawn once, kept as tokens, looked at in many ways.

Of every candidate of every caption its tokens (2 KB for 32 x 32), its log-likelihood and CLIP's
score are written as they are drawn, in files of SHARD captions; a drawing that was stopped goes on
behind the last of them, in the same batches. Which candidate is the best of the first N is a
question to the scores, so one drawing of 512 candidates answers for N = 1, 2, ..., 512.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle_jax import runs
from dalle_jax.generate import Model, Sampling
from dalle_jax.progress import Images

SHARD = 64


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
        for begin in range(0, len(chosen), SHARD):
            with np.load(_file(self.directory, begin)) as stored:
                part = chosen[begin:begin + SHARD]
                rows = np.arange(len(part)).reshape(-1, *(1,) * (part.ndim - 1))
                found.append(stored['ids'][rows, part].astype(np.int32))
        return np.concatenate(found)


def draw(model: Model, captions: Sequence[str], sampling: Sampling, directory: Path, name: str
         ) -> Candidates:
    """Draws what is not there yet, and reads all.

    Args:
      sampling: with a batch, see Model.fit: what is continued must be drawn in the same batches.
      name: what the console calls it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    start = _complete(directory, len(captions))
    if start:
        runs.say(f'{name}: {start:,} of {len(captions):,} captions are drawn')
    rows, told = [], Images((len(captions) - start) * sampling.candidates, name)
    drawing = model.draw(captions, sampling, start=start, progress=told)
    for number, drawn in enumerate(drawing, start=start + 1):
        rows.append(drawn)
        if number % SHARD == 0 or number == len(captions):
            _write(_file(directory, number - len(rows)), rows)
            rows = []
    return _read(directory, len(captions))


def _file(directory, begin):
    return directory / f'{begin:06}.npz'


def _complete(directory, captions):
    """How many captions are drawn: whole files from the first on."""
    begin = 0
    while begin < captions and _file(directory, begin).exists():
        begin = min(begin + SHARD, captions)
    return begin


def _write(path, rows):
    arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in ('ids', 'logp')}
    arrays['ids'] = arrays['ids'].astype(np.uint16)
    arrays['logp_text'] = np.array([row.logp_text for row in rows], np.float32)
    if rows[0].scores is not None:
        arrays['scores'] = np.stack([row.scores for row in rows])
    runs.write_arrays(path, arrays)


def _read(directory, captions):
    parts = []
    for begin in range(0, captions, SHARD):
        with np.load(_file(directory, begin)) as stored:
            parts.append({name: stored[name] for name in stored.files if name != 'ids'})
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Candidates(directory, found['logp'], found['logp_text'], found.get('scores'))
