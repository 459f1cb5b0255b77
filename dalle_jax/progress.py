"""The console's line about training: where it is, how fast, how long it still takes."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dalle_jax.runs import say

QUIET = ('steps_per_s', 'examples_per_s', 'tokens_per_second', 'model_tflops', 'mfu', 'data_wait',
         'skipped', 'learning_rate')


class Work(NamedTuple):
    """What a training step does, and what the machine could do.

    Attributes:
      flops: model FLOPs of training on an example: no recomputation, no frozen models.
      peak: FLOP/s of the machine in plain matrix products of the same type.
      tokens: of an example; 0 for models without.
    """

    flops: int
    peak: float
    tokens: int = 0


class Progress:
    """Speed and time left, not counting compilation, validation and saving."""

    def __init__(self, name, first, last, group, batch_size, work):
        self.name, self.step, self.last, self.batch_size = name, first, last, batch_size
        self._group, self._work = group, work
        self._mark, self._aside, self._rate = time.monotonic(), 0.0, None
        self._waited, self._starved = 0.0, 0.0

    def start(self):
        """Called when the first dispatch, which compiles, is done."""
        say(f'{self.name}: compiled and ran the first step in '
            f'{time.monotonic() - self._mark:.1f} s')
        self._mark, self.step = time.monotonic(), self.step + self._group

    def paused(self):
        """A context whose time does not count as training speed."""
        return _Aside(self)

    def got_batch(self, wait_seconds, device_idle):
        """Waiting for a batch costs something only if the device has run out of work by then."""
        if device_idle:
            self._starved += wait_seconds - self._waited
        self._waited = wait_seconds

    def rates(self, step: int) -> dict[str, float]:
        """Speed since the last call, and the share of it in which the device had no work.

        model_tflops counts model FLOPs, in 10^12 a second; mfu is the share of the machine's rate.
        """
        now = time.monotonic()
        busy = max(now - self._mark - self._aside, 1e-9)
        # A window that holds only the step that compiled has no speed.
        self._rate = (step - self.step) / busy if step > self.step else float('nan')
        starved = self._starved / busy
        self.step, self._mark, self._aside, self._starved = step, now, 0.0, 0.0
        examples = self._rate * self.batch_size
        flops = examples * self._work.flops
        tokens = {'tokens_per_second': examples * self._work.tokens} if self._work.tokens else {}
        return {'steps_per_s': self._rate, 'examples_per_s': examples, **tokens,
                'model_tflops': flops / 1e12, 'mfu': flops / self._work.peak, 'data_wait': starved}

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """What the console says of a log interval."""
        left = (self.last - step) / self._rate
        left = clock(left) if np.isfinite(left) else 'unknown'
        tokens = (f'  {values["tokens_per_second"]:,.0f} tokens/s'
                  if 'tokens_per_second' in values else '')
        return (f'{self.name}: step {step}/{self.last}  {brief(values)}  '
                f'{values["examples_per_s"]:.3g} examples/s{tokens}  '
                f'{values["model_tflops"]:.3g} TFLOP/s  MFU {values["mfu"]:.1%}  '
                f'wait {values["data_wait"]:.1%}  left {left}')


class Images:
    """Tells the number of images drawn, their rate and the time left, every few seconds.

    Args:
      total: images.
      name: what the line begins with, if anything.
      done: what has been done to them.
    """

    def __init__(self, total: int, name: str = '', done: str = 'drawn'):
        self._total, self._images, self._name = total, 0, name and f'{name}: '
        self._done = done
        self._began = self._told = time.monotonic()

    def __call__(self, images: int):
        """So many more."""
        self._images, now = self._images + images, time.monotonic()
        if now - self._told > 2 or self._images == self._total:
            rate, self._told = self._images / (now - self._began), now
            say(f'{self._name}{self._images:,}/{self._total:,} images {self._done}, {rate:.1f} '
                f'images/s, left {clock((self._total - self._images) / rate)}')


class _Aside:
    """Time within this block does not count as training speed."""

    def __init__(self, progress):
        self._progress = progress

    def __enter__(self):
        self._start = time.monotonic()

    def __exit__(self, *_):
        self._progress._aside += time.monotonic() - self._start


def brief(values: Mapping[str, float]) -> str:
    """Metrics in a line, without those that are only worth a curve."""
    return '  '.join(f'{k} {v:.4g}' for k, v in values.items()
                     if k not in QUIET and not k.startswith('alarm/'))


def clock(seconds: float) -> str:
    """h:mm:ss."""
    seconds = int(seconds)
    return f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'
