"""Charts are read back: their figures are parsed as XML, pixels turned into values through nothing
but the tick labels, maps decoded from their data URIs."""

import base64
import io
import math
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_jax import plots

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 6))


def find(figure: xml.Element, tag: str, kind: str = '') -> list[xml.Element]:
    return [e for e in figure.iter(tag) if kind in e.get('class', '').split() or not kind]


def text(figure: xml.Element) -> str:
    return ''.join(figure.itertext())


def alpha_of(element: xml.Element) -> np.ndarray:
    png = base64.b64decode(element.get('href').removeprefix('data:image/png;base64,'))
    return np.asarray(Image.open(io.BytesIO(png)).convert('RGBA'))[..., 3]


def label_value(label: str) -> float:
    scale = {'k': 1e3, 'M': 1e6}.get(label[-1], 1.0)
    return float(label.rstrip('kM')) * scale


def axes_of(chart: xml.Element, log: bool = False):
    """Maps from pixels to values, fitted to nothing but the positions and labels of the ticks."""
    maps = []
    for kind, axis in (('x', 'x'), ('y', 'y')):
        ticks = [(float(e.get(axis)), label_value(e.text)) for e in find(chart, 'text', kind)]
        pixels, values = np.array(ticks).T
        assert len(set(values)) == len(values) >= 2
        logarithmic = log and axis == 'y'
        fit = np.polyfit(pixels, np.log10(values) if logarithmic else values, 1)
        maps.append(lambda p, fit=fit, logarithmic=logarithmic: (
            10 ** np.polyval(fit, p) if logarithmic else np.polyval(fit, p)))
    return maps


def runs_of(path: str) -> list[np.ndarray]:
    return [np.array([point.split(',') for point in run.split('L')], float)
            for run in path.split('M')[1:]]


@settings(max_examples=30, deadline=None)
@given(st.lists(finite, min_size=2, max_size=40), st.booleans())
def test_a_curve_reads_back_through_its_ticks(values, log):
    values = np.array(values)
    if log:
        values = 10 ** (values / 2e5)  # positive, over ten decades
    steps = np.cumsum(np.arange(1, len(values) + 1)).astype(float)
    chart = xml.fromstring(plots.curves({'a': (steps, values)}, x='', log=log))
    to_step, to_value = axes_of(chart, log)
    points, = runs_of(find(chart, 'path')[0].get('d'))
    np.testing.assert_allclose(to_step(points[:, 0]), steps, atol=np.ptp(steps) * 1e-3)
    scale = np.log10 if log else np.asarray
    top, bottom = scale(to_value(np.array([plots.TOP, plots.HEIGHT - plots.BOTTOM])))
    # Coordinates, those of ticks too, are written to a tenth of a pixel.
    np.testing.assert_allclose(scale(to_value(points[:, 1])), scale(values),
                               atol=1e-3 * (top - bottom))
    if np.ptp(values) > 1e-6 * np.abs(values).max():
        assert np.ptp(points[:, 1]) > 0.6 * (plots.HEIGHT - plots.BOTTOM - plots.TOP)
    assert points[:, 0].min() >= 0 and points[:, 0].max() <= plots.WIDTH
    assert points[:, 1].min() >= 0 and points[:, 1].max() <= plots.HEIGHT


@settings(max_examples=30, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(-6, 6))
def test_ticks_are_round_even_and_inside(low, magnitude):
    high = low + 10 ** magnitude + 1e-6 * abs(low)
    axis = plots.Axis(low, high, 0, 100)
    values, labels = zip(*axis.ticks())
    assert 2 <= len(values) <= 8
    step = np.diff(values).mean()
    slack = 1e-9 * (high - low)
    assert low - slack <= values[0] and values[-1] <= high + slack
    np.testing.assert_allclose(np.diff(values), step, rtol=1e-4)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3
    np.testing.assert_allclose([label_value(label) for label in labels], values, rtol=1e-9)


@pytest.mark.parametrize('low, high, labels', [
    (0, 1, ['0', '0.2', '0.4', '0.6', '0.8', '1.0']),
    (0, 5, ['0', '1', '2', '3', '4', '5']),
    (0, 3e-4, ['0', '5e-5', '1e-4', '1.5e-4', '2e-4', '2.5e-4', '3e-4']),
    (-1, 1, ['-1.0', '-0.5', '0', '0.5', '1.0']),
    (0, 100_000, ['0', '20k', '40k', '60k', '80k', '100k']),
    (0, 1_500_000, ['0', '0.5M', '1.0M', '1.5M'])])
def test_tick_labels(low, high, labels):
    assert [label for _, label in plots.Axis(low, high, 0, 1).ticks()] == labels


@pytest.mark.parametrize('low, high, values', [
    (0.5, 2000, [1, 10, 100, 1000]), (0.04, 3, [0.05, 0.1, 0.2, 0.5, 1, 2]),
    (3.1, 3.35, [3.1, 3.15, 3.2, 3.25, 3.3, 3.35]), (1e-9, 1e3, [1e-9, 1e-6, 1e-3, 1, 1e3])])
def test_logarithmic_ticks(low, high, values):
    assert [v for v, _ in plots.Axis(low, high, 0, 1, log=True).ticks()] == values


def test_gaps_are_left_and_counted():
    values = np.array([1.0, 2.0, np.nan, 4.0, np.inf, -np.inf, 7.0, 8.0, 9.0])
    chart = xml.fromstring(plots.curves({'a': (np.arange(9), values)}, x=''))
    runs = runs_of(find(chart, 'path')[0].get('d'))
    assert [len(run) for run in runs] == [2, 2, 3]  # a lone point is a line to itself
    to_step, to_value = axes_of(chart)
    np.testing.assert_allclose(to_step(runs[1][:, 0]), [3, 3], atol=0.02)
    np.testing.assert_allclose(to_value(runs[2][:, 1]), [7, 8, 9], atol=0.02)
    assert '3 values are not finite' in text(chart)
    assert [text(e) for e in find(chart, 'td')] == ['a', '9', '1', '9']
    positive = xml.fromstring(plots.curves({'a': (np.arange(3), [0.0, 1.0, 10.0])}, log=True))
    assert '1 value is not finite or not positive' in text(positive)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2 ** 32 - 1), st.integers(1, 400), st.integers(1, 20), st.booleans())
def test_decimation_keeps_the_ends_and_the_extremes(seed, size, buckets, gaps):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=size)
    values[rng.random(size) < 0.3 * gaps] = np.nan
    drawn = np.isfinite(values)
    kept = plots.decimate(values, drawn, buckets)
    assert (np.diff(kept) > 0).all() and drawn[kept].all()
    assert len(kept) <= 2 * buckets + 2
    if drawn.any():
        all_drawn = np.flatnonzero(drawn)
        assert {all_drawn[0], all_drawn[-1]} <= set(kept)
        assert values[kept].min() == values[drawn].min()
        assert values[kept].max() == values[drawn].max()


def test_running_mean_is_the_mean_of_the_window():
    rng = np.random.default_rng(3)
    values = rng.normal(size=700)
    values[[0, 10, 300, 301, 302]] = np.nan
    drawn = np.isfinite(values)
    half = 7  # a hundredth of the points to each side
    expected = [np.nanmean(values[max(0, i - half):i + half + 1]) for i in range(700)]
    np.testing.assert_allclose(plots.running_mean(values, drawn), expected, atol=1e-12)


def test_long_curves_stay_small_and_only_rough_ones_are_smoothed():
    rng = np.random.default_rng(4)
    steps = np.arange(100_000)
    smooth = np.exp(-steps / 2e4)
    html = plots.curves({'rough': (steps, smooth + 0.1 * rng.normal(size=100_000)),
                         'smooth': (steps, smooth)})
    chart = xml.fromstring(html)
    assert len(html) < 40_000
    assert [e.get('class') for e in find(chart, 'path')] == ['s0 raw', 's0', 's1']
    assert len(find(chart, 'rect', 'strip')) <= plots.HOVERS


def test_hovering_tells_the_values():
    chart = xml.fromstring(plots.curves({'train': ([0, 10, 20], [3.0, 2.0, 1.0]),
                                 'valid': ([10], [2.5])}))
    assert [e.text for e in find(chart, 'title')] == [
        'step 0\ntrain 3', 'step 10\ntrain 2\nvalid 2.5', 'step 20\ntrain 1']
    strips = [(float(e.get('x')), float(e.get('width')))
              for e in find(chart, 'rect', 'strip')]
    for (left, width), (after, _) in zip(strips, strips[1:]):
        assert abs(left + width - after) <= 0.11


def test_a_ramp_draws_every_line_and_colours_them_in_order():
    rng = np.random.default_rng(6)
    steps = np.arange(10, 1010, 10.0)
    lines = {f'layer {i:02}': (steps[i:], rng.normal(i, 2, len(steps) - i)) for i in range(17)}
    lines['layer 03'][1][50] = np.nan
    chart = xml.fromstring(plots.curves(lines, x='', ramp=True))
    to_step, to_value = axes_of(chart)
    paths = find(chart, 'path', 'ramp')
    assert len(paths) == 17 == len(find(chart, 'path'))
    for path, (at, values) in zip(paths, lines.values()):
        points = np.concatenate(runs_of(path.get('d')))
        drawn = np.isfinite(values)
        np.testing.assert_allclose(to_step(points[:, 0]), at[drawn], atol=1.5)
        np.testing.assert_allclose(to_value(points[:, 1]), values[drawn], atol=0.05)
    shades = [float(path.get('style').removeprefix('--t:')) for path in paths]
    np.testing.assert_allclose(shades, np.linspace(0, 1, 17), atol=5e-4)
    legend, = find(chart, 'div', 'scale')
    assert text(legend) == 'layer 00layer 16' and find(legend, 'i', 'ramp')
    assert '1 value is not finite' in text(chart) and not find(chart, 'table')


def test_hovering_over_a_ramp_tells_the_lowest_and_the_highest():
    chart = xml.fromstring(plots.curves({'a': ([1, 2], [5.0, 1.0]), 'b': ([1, 2], [3.0, 4.0]),
                                         'c': ([1], [9.0])}, ramp=True))
    assert [e.text for e in find(chart, 'title')] == ['step 1\nb 3\nc 9', 'step 2\na 1\nb 4']


def test_a_ramp_of_one_line_and_of_many_long_ones():
    one = xml.fromstring(plots.curves({'only': ([1, 2], [3.0, 4.0])}, ramp=True))
    assert find(one, 'path')[0].get('style') == '--t:0.000'
    assert text(find(one, 'div', 'scale')[0]) == 'onlyonly'
    rng = np.random.default_rng(7)
    steps = np.arange(4000)
    lines = {str(i): (steps, i + rng.normal(size=4000).cumsum()) for i in range(64)}
    html = plots.curves(lines, ramp=True)
    assert len(html) < 200_000
    chart = xml.fromstring(html)
    _, to_value = axes_of(chart)
    for path, (_, values) in zip(find(chart, 'path'), lines.values()):
        shown = to_value(runs_of(path.get('d'))[0][:, 1])
        np.testing.assert_allclose([shown.min(), shown.max(), shown[-1]],
                                   [values.min(), values.max(), values[-1]], atol=2)


@pytest.mark.parametrize('counts, used, perplexity', [
    (np.full(64, 7), 64, 64), (np.eye(1, 50, 3)[0] * 9, 1, 1),
    (np.array([0, 1, 0, 3]), 2, math.exp(math.log(4) - 0.75 * math.log(3)))])
def test_histogram_summary(counts, used, perplexity):
    caption = xml.fromstring(plots.histogram(counts)).find('figcaption')
    assert caption.text.startswith(f'{used} of {len(counts)} codes used')
    assert caption.text.endswith(f'perplexity {plots.number(perplexity)}.')


def test_histogram_reads_back_sorted():
    counts = np.array([5, 0, 900, 40, 40, 1, 3000])
    chart = xml.fromstring(plots.histogram(counts))
    _, to_count = axes_of(chart, log=True)
    tops = [float(v) for v in re.findall(r'V([\d.]+)H', find(chart, 'path')[0].get('d'))]
    expected = np.sort(counts[counts > 0])[::-1]
    np.testing.assert_allclose(to_count(np.array(tops)), expected, rtol=0.02)
    assert find(chart, 'title')[0].text == 'rank 1: code 6, 3,000'


def test_attention_maps_show_the_weights():
    rng = np.random.default_rng(5)
    weights = np.tril(rng.random((40, 40)) + 0.01)
    weights /= weights.sum(1, keepdims=True)
    shown = xml.fromstring(plots.matrix({'row': weights}, boundary=10))
    image, = find(shown, 'image')
    alpha = alpha_of(image)
    np.testing.assert_array_equal(alpha > 0, weights > 0)
    assert alpha[0, 0] == 255 == alpha.max()
    order = np.argsort(weights.ravel())
    assert (np.diff(alpha.ravel()[order].astype(int)) >= 0).all()
    side = float(find(shown, 'rect')[0].get('width'))
    down, across = find(shown, 'line')
    assert float(down.get('x1')) == float(across.get('y1')) == side * 10 / 40
    assert [e.text for e in find(shown, 'text')] == ['text', 'image']


def test_a_large_map_is_pooled_to_its_largest_weights():
    weights = np.zeros((1001, 1001))
    weights[1000, 3] = 1.0
    shown = xml.fromstring(plots.matrix({'a': weights}))
    image, = find(shown, 'image')
    alpha = alpha_of(image)
    factor = math.ceil(1001 / plots.MATRIX_SIZE)
    assert len(alpha) == math.ceil(1001 / factor) <= plots.MATRIX_SIZE
    assert np.argwhere(alpha).tolist() == [[1000 // factor, 3 // factor]]
    # The last dot covers less than others, and hangs over the edge instead of stretching the map.
    assert float(image.get('width')) == pytest.approx(300 * len(alpha) * factor / 1001, abs=0.05)


@pytest.mark.parametrize('value, text', [
    (0, '0'), (12345, '12,345'), (2.31249, '2.312'), (0.001, '0.001'), (3.14e-5, '3.14e-5'),
    (-1234.5, '-1,234'), (3e12, '3e12'), (math.nan, 'NaN'), (math.inf, '∞'),
    (-math.inf, '−∞'), (np.float32(0.1), '0.1'), (True, '1')])
def test_numbers(value, text):
    assert plots.number(value) == text


@pytest.mark.parametrize('draw, told', [
    (lambda: plots.curves({'loss': ([1, 2], [3.0])}), "'loss'"),
    (lambda: plots.histogram(np.array([1, -2])), '-2'),
    (lambda: plots.histogram(np.array([1, np.nan])), 'finite'),
    (lambda: plots.matrix({'row': np.zeros(3)}), "'row'")])
def test_what_cannot_be_drawn_is_named(draw, told):
    with pytest.raises(ValueError, match=told):
        draw()
