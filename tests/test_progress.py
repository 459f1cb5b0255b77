"""The rates of a log line in closed form."""

import math

import pytest

from dalle_jax import progress
from dalle_jax.progress import Progress, Work


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    return now


def test_rates_count_examples_tokens_and_flops(clock, capsys):
    work = Work(flops=3_000_000, peak=2e9, tokens=20)
    bar = Progress('x', 0, 100, 1, 8, work)
    clock[0] += 50  # compiling
    bar.start()
    clock[0] += 4
    with bar.paused():
        clock[0] += 7  # validating
    rates = bar.rates(11)  # ten steps of 8 examples in 4 seconds
    assert rates == {'steps_per_s': 2.5, 'examples_per_s': 20.0, 'tokens_per_second': 400.0,
                     'model_tflops': pytest.approx(6e-5), 'mfu': pytest.approx(0.03),
                     'data_wait': 0.0}
    line = bar.line(11, {'loss': 1.5, **rates})
    assert line == ('x: step 11/100  loss 1.5  20 examples/s  400 tokens/s  6e-05 TFLOP/s  '
                    'MFU 3.0%  wait 0.0%  left 0:00:35')


def test_models_without_tokens_have_none(clock):
    bar = Progress('x', 0, 10, 1, 4, Work(10, 1e3))
    bar.start()
    clock[0] += 2
    rates = bar.rates(5)
    assert 'tokens_per_second' not in rates and rates['mfu'] == pytest.approx(8 * 10 / 1e3)
    assert 'tokens/s' not in bar.line(5, rates)


def test_a_window_of_the_compiling_step_has_no_speed(clock):
    bar = Progress('x', 0, 10, 1, 4, Work(10, 1e3, 2))
    bar.start()
    rates = bar.rates(1)
    assert all(math.isnan(rates[name]) for name in ('mfu', 'model_tflops', 'tokens_per_second'))
    assert 'left unknown' in bar.line(1, rates)
