"""Candidates are drawn once, wherever the drawing was stopped, and asked many questions."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from dalle_jax import runs
from dalle_jax.evaluation import candidates as lib
from dalle_jax.generate import Sampling

N = 7
CAPTIONS = [f'caption {i % 140}' for i in range(150)]  # ten stand twice


class Drawn(NamedTuple):
    images: Any
    ids: Any
    logp: Any
    logp_text: float
    scores: Any


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(lib, 'IMAGES', 64 * N + 3)


class Model:
    """Draws tokens that are a function of caption and index; may stop."""

    def __init__(self, stop_after=10**6, clip=True):
        self.drawn, self._stop_after, self._clip = [], stop_after, clip

    def draw(self, captions, sampling, start=0, firsts=(), progress=lambda n: None):
        for i in range(start, len(captions)):
            if len(self.drawn) == self._stop_after:
                raise KeyboardInterrupt
            self.drawn.append(i)
            progress(sampling.candidates)
            rng = np.random.default_rng(i)
            assert firsts[i] == N * CAPTIONS[:i].count(CAPTIONS[i])
            yield Drawn(
                images='large', ids=rng.integers(0, 60_000, (N, 3, 4)).astype(np.int32), logp_text=float(i),
                logp=rng.normal(size=N).astype(np.float32),
                scores=rng.normal(size=N).astype(np.float32) if self._clip else None)


def draw(model, directory):
    return lib.draw(model, CAPTIONS, Sampling(N), directory, 'test')


def test_stopped_and_continued_is_the_same(tmp_path):
    whole = draw(Model(), tmp_path / 'whole')
    with pytest.raises(KeyboardInterrupt):
        draw(Model(100), tmp_path / 'other')
    model = Model()
    continued = draw(model, tmp_path / 'other')
    assert model.drawn[0] == 64 and model.drawn[-1] == 149
    again = Model()
    draw(again, tmp_path / 'other')
    assert not again.drawn
    every = np.tile(np.arange(N), (150, 1))
    for name in ('logp', 'logp_text', 'scores'):
        np.testing.assert_array_equal(getattr(whole, name), getattr(continued, name))
    np.testing.assert_array_equal(whole.tokens(every), continued.tokens(every))


@pytest.mark.parametrize('clip', [True, False])
def test_the_best_of_the_first(tmp_path, clip):
    drawn = list(Model(clip=clip).draw(
        CAPTIONS, Sampling(N), firsts=[N * CAPTIONS[:i].count(c) for i, c in enumerate(CAPTIONS)]))
    found = draw(Model(clip=clip), tmp_path)
    for n in (1, 2, 5, N):
        best = found.best_of(n)
        expected = [max(range(n), key=(d.scores if clip else d.logp).__getitem__) for d in drawn]
        assert best.tolist() == expected
        np.testing.assert_array_equal(found.tokens(best),
                                      [d.ids[i] for d, i in zip(drawn, expected)])
    assert (found.scores is None) == (not clip)


def test_a_damaged_file_is_named(tmp_path):
    found = draw(Model(), tmp_path)
    file = tmp_path / '000064.npz'
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(runs.RunError, match='000064.npz is damaged .*; remove it, and the same'):
        found.tokens(found.best_of(1))
    file.unlink()
    model = Model()
    draw(model, tmp_path)
    assert model.drawn[0] == 64
