"""The report is checked as its reader meets it: pages are parsed, charts are read back through
their tick labels, pictures are decoded from their data URIs."""

import base64
import io
import json
import math
import os
import re
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_jax import plots, report

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}
ATTACK = '</title><script>alert("x")</script><img src=x onerror=alert(1)> & \' "'
finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 6))


class Parsed(HTMLParser):
    """A strict reading: every element is closed in order, nothing points outside the page."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], ''
        self.feed(html)
        self.close()
        assert not self.open, f'never closed: {self.open}'

    def handle_starttag(self, tag, attributes):
        self.note(tag, attributes)
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.note(tag, attributes)

    def note(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), f'{tag} repeats an attribute'
        assert tag not in ('script', 'link', 'iframe', 'object', 'base')
        attributes = dict(attributes)
        for name, value in attributes.items():
            assert not name.startswith('on'), f'{tag} has a handler {name}'
            if name in ('src', 'href', 'action', 'poster', 'srcset'):
                assert re.match(r'data:image/png;base64,[\w+/=]+$', value)
            if name == 'style':
                assert 'url' not in value and '//' not in value
        self.elements.append(types.SimpleNamespace(tag=tag, text='', **{
            'attributes': attributes, 'kind': attributes.get('class', '').split()}))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1].tag == tag, f'</{tag}> closes {self.open[-1:]}'
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text += data
        if not any(element.tag in ('style', 'title') for element in self.open):
            self.text += data

    def find(self, tag, kind=None):
        return [e for e in self.elements if e.tag == tag and (kind is None or kind in e.kind)]

    def images(self, tag='img', source='src'):
        return [Image.open(io.BytesIO(base64.b64decode(e.attributes[source].partition(',')[2])))
                for e in self.find(tag)]


def label_value(label: str) -> float:
    scale = {'k': 1e3, 'M': 1e6}.get(label[-1], 1.0)
    return float(label.rstrip('kM')) * scale


def axes_of(chart: Parsed, log: bool = False):
    """Maps from pixels to values, fitted to nothing but the positions and labels of the ticks."""
    maps = []
    for kind, axis in (('x', 'x'), ('y', 'y')):
        ticks = [(float(e.attributes[axis]), label_value(e.text)) for e in chart.find('text', kind)]
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


def everything(rng) -> list[str]:
    images = rng.integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    steps = np.arange(300)
    return [
        report.facts({ATTACK: ATTACK, 'right': report.Fact(0.97, ATTACK, True), 'n': 12345}),
        report.note(ATTACK), report.note(ATTACK, alarm=True), report.stages({ATTACK: 2.0, 'b': 70.}),
        report.table([[ATTACK, 1.5, True], ['b', None, False]], [ATTACK, 'value', 'met']),
        report.section(ATTACK, ATTACK,
                       report.curves({ATTACK: (steps, rng.normal(size=300))}, ATTACK, ATTACK, ATTACK),
                       report.histogram(rng.integers(0, 9, 50), ATTACK),
                       report.matrix({ATTACK: rng.random((6, 6))}, 2, ATTACK)),
        report.image_grid(images, [ATTACK] * 3, [True, False, None], ATTACK),
        report.side_by_side({ATTACK: images, 'b': images / 255}, [ATTACK] * 3, {'b': [True] * 3}),
        report.candidates(ATTACK, images, [1.0, 3.0, 2.0], [True, False, None], 1)]


def test_page_is_well_formed_self_contained_and_escapes_what_it_is_given():
    html = report.page(ATTACK, ATTACK, everything(np.random.default_rng(0)))
    parsed = Parsed(html)
    assert parsed.text.count(ATTACK) >= 20  # every mention is there, as text
    assert not re.search(r'https?://|url\(|@import|<script', re.sub(r'base64,[\w+/=]+', '', html))
    policy = next(e.attributes['content'] for e in parsed.find('meta')
                  if e.attributes.get('http-equiv') == 'Content-Security-Policy')
    assert policy.startswith("default-src 'none'") and 'http' not in policy
    assert any(e.attributes.get('name') == 'viewport' for e in parsed.find('meta'))


def test_themes_keep_their_contrast():
    """WCAG 2.1 contrast: 4.5 for text, 3 for the lines of charts."""
    def luminance(colour):
        parts = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    light, dark = (dict(re.findall(r'--(\w+): (#\w{6})', part))
                   for part in re.findall(r':root \{(.*?)\}', report.STYLE, re.S))
    assert set(light) == set(dark)
    for theme in (light, dark):
        for name, ground in [*((name, 'paper') for name in theme), ('soft', 'wash'),
                             ('ink', 'wash'), ('ink', 'alarm')]:
            if name in ('paper', 'line', 'wash', 'alarm'):
                continue
            bright, dim = sorted(map(luminance, (theme[name], theme[ground])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= (3 if name[0] == 'c' else 4.5), (name, ground)


def test_pictures_decode_to_the_pixels_given():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    shown = Parsed(report.image_grid(images, list('abcd')))
    for image, given, element, name in zip(shown.images(), images, shown.find('img'), 'abcd'):
        np.testing.assert_array_equal(np.asarray(image), given)
        assert element.attributes['alt'] == name
    # Floats round to the nearest level, are clipped, and survive a diverged model.
    floats = np.array([[[0.0, 1.0, 0.5 / 255 + 1e-6], [-3.0, 7.0, np.nan]]])
    image, = Parsed(report.image_grid(floats[None])).images()
    np.testing.assert_array_equal(np.asarray(image), [[[0, 255, 1], [0, 255, 0]]])


def test_side_by_side_aligns_the_versions_of_an_example():
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
    shown = Parsed(report.side_by_side({'original': first, 'lookup': second}, ['p', 'q', 'r'],
                                       {'lookup': np.array([True, False, True])}))
    expected = np.stack([first, second], 1).reshape(-1, 4, 4, 3)
    for image, given in zip(shown.images(), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(image), given)
    assert [e.text.strip() for e in shown.find('div', 'caption')] == ['p', 'q', 'r']
    marks = [e.attributes['aria-label'] for e in shown.find('svg', 'verdict')]
    assert marks == ['right', 'wrong', 'right']


def test_candidates_are_ranked_and_only_the_chosen_one_is_framed():
    images = np.zeros((4, 2, 2, 3), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
    shown = Parsed(report.candidates('c', images, np.array([0.1, 0.4, 0.2, 0.3]),
                                     np.array([True, False, True, True]), chosen=3))
    assert [np.asarray(image)[0, 0, 0] for image in shown.images()] == [1, 3, 2, 0]
    assert [e.text for e in shown.find('div', 'label')] == [
        'wrong0.4', 'right0.3', 'right0.2', 'right0.1']
    framed, = shown.find('div', 'chosen')
    assert '0.3' in framed.text
    assert [e.attributes['alt'] for e in shown.find('img')] == ['c', 'c (chosen)', 'c', 'c']


@pytest.mark.parametrize('make, told', [
    (lambda: report.image_grid(np.zeros((2, 4, 4, 1), np.uint8)), r'\[4, 4, 1\]'),
    (lambda: report.image_grid(np.zeros((2, 4, 4, 3), np.int32)), 'int32'),
    (lambda: report.image_grid(np.zeros((2, 4, 4, 3), np.uint8), ['one']), "'captions': 1"),
    (lambda: report.candidates('c', np.zeros((2, 4, 4, 3)), [1.0], None, 0), "'scores': 1"),
    (lambda: report.curves({'loss': ([1, 2], [3.0])}), "'loss'"),
    (lambda: report.histogram(np.array([1, -2])), '-2'),
    (lambda: report.matrix({'row': np.zeros(3)}), "'row'")])
def test_wrong_shapes_are_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_nothing_to_show_gives_a_sentence():
    none = np.zeros((0, 4, 4, 3), np.uint8)
    blocks = [report.curves({}), report.curves({'a': ([], [])}), report.matrix({}),
              report.curves({'a': ([1, 2], [0.0, -1.0])}, log=True), report.histogram(np.zeros(8)),
              report.histogram(np.zeros(0)), report.matrix({'a': np.zeros((3, 3))}),
              report.image_grid(none), report.side_by_side({}), report.side_by_side({'a': none}),
              report.table([], ['a']), report.stages({})]
    for block in blocks:
        empty, = Parsed(block).find('p', 'empty')
        assert empty.text.endswith('.')
    Parsed(report.page('', '', [report.facts({}), report.section('', '')]))


@settings(max_examples=30, deadline=None)
@given(st.lists(finite, min_size=2, max_size=40), st.booleans())
def test_a_curve_reads_back_through_its_ticks(values, log):
    values = np.array(values)
    if log:
        values = 10 ** (values / 2e5)  # positive, over ten decades
    steps = np.cumsum(np.arange(1, len(values) + 1)).astype(float)
    chart = Parsed(plots.curves({'a': (steps, values)}, x='', log=log))
    to_step, to_value = axes_of(chart, log)
    points, = runs_of(chart.find('path')[0].attributes['d'])
    # A coordinate is written, like that of a tick, to a tenth of a pixel.
    np.testing.assert_allclose(to_step(points[:, 0]), steps, atol=np.ptp(steps) * 1e-3)
    found = to_value(points[:, 1])
    if log:
        found, values = np.log10(found), np.log10(values)
    scale = np.ptp(values) if np.ptp(values) > 1e-9 * np.abs(values).max() else 0
    np.testing.assert_allclose(found, values, atol=2e-3 * (scale or 1 + np.abs(values).max()))
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
    chart = Parsed(plots.curves({'a': (np.arange(9), values)}, x=''))
    runs = runs_of(chart.find('path')[0].attributes['d'])
    assert [len(run) for run in runs] == [2, 2, 3]  # a lone point is a line to itself
    to_step, to_value = axes_of(chart)
    np.testing.assert_allclose(to_step(runs[1][:, 0]), [3, 3], atol=0.02)
    np.testing.assert_allclose(to_value(runs[2][:, 1]), [7, 8, 9], atol=0.02)
    assert '3 values are not finite' in chart.text
    assert [e.text for e in chart.find('td')] == ['a', '9', '1', '9']
    positive = Parsed(plots.curves({'a': (np.arange(3), [0.0, 1.0, 10.0])}, log=True))
    assert '1 value is not finite or not positive' in positive.text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(finite, st.just(math.nan)), min_size=1, max_size=300),
       st.integers(1, 20))
def test_decimation_keeps_the_ends_and_the_extremes(values, buckets):
    values = np.array(values)
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
    chart = Parsed(html)
    assert len(html) < 40_000
    assert [e.kind for e in chart.find('path')] == [['s0', 'raw'], ['s0'], ['s1']]
    assert len(chart.find('rect', 'strip')) <= plots.HOVERS


def test_hovering_tells_the_values():
    chart = Parsed(plots.curves({'train': ([0, 10, 20], [3.0, 2.0, 1.0]),
                                 'valid': ([10], [2.5])}))
    assert [e.text for e in chart.find('title')] == [
        'step 0\ntrain 3', 'step 10\ntrain 2\nvalid 2.5', 'step 20\ntrain 1']
    strips = [(float(e.attributes['x']), float(e.attributes['width']))
              for e in chart.find('rect', 'strip')]
    for (left, width), (after, _) in zip(strips, strips[1:]):
        assert abs(left + width - after) <= 0.11


@pytest.mark.parametrize('counts, used, perplexity', [
    (np.full(64, 7), 64, 64), (np.eye(1, 50, 3)[0] * 9, 1, 1),
    (np.array([0, 1, 0, 3]), 2, math.exp(math.log(4) - 0.75 * math.log(3)))])
def test_histogram_summary(counts, used, perplexity):
    caption, = Parsed(plots.histogram(counts)).find('figcaption')
    assert caption.text.startswith(f'{used} of {len(counts)} codes used')
    assert caption.text.endswith(f'perplexity {plots.number(perplexity)}.')


def test_histogram_reads_back_sorted():
    counts = np.array([5, 0, 900, 40, 40, 1, 3000])
    chart = Parsed(plots.histogram(counts))
    _, to_count = axes_of(chart, log=True)
    tops = [float(v) for v in re.findall(r'V([\d.]+)H', chart.find('path')[0].attributes['d'])]
    expected = np.sort(counts[counts > 0])[::-1]
    np.testing.assert_allclose(to_count(np.array(tops)), expected, rtol=0.02)
    assert chart.find('title')[0].text == 'rank 1: code 6, 3,000'


def test_attention_maps_show_the_weights():
    rng = np.random.default_rng(5)
    weights = np.tril(rng.random((40, 40)) + 0.01)
    weights /= weights.sum(1, keepdims=True)
    shown = Parsed(plots.matrix({'row': weights}, boundary=10))
    image, = shown.images('image', 'href')
    alpha = np.asarray(image.convert('RGBA'))[..., 3]
    np.testing.assert_array_equal(alpha > 0, weights > 0)
    assert alpha[0, 0] == 255 == alpha.max()
    order = np.argsort(weights.ravel())
    assert (np.diff(alpha.ravel()[order].astype(int)) >= 0).all()
    side = float(shown.find('rect')[0].attributes['width'])
    down, across = shown.find('line')
    assert float(down.attributes['x1']) == float(across.attributes['y1']) == side * 10 / 40
    assert [e.text for e in shown.find('text')] == ['text', 'image']


def test_a_large_map_is_pooled_to_its_largest_weights():
    weights = np.zeros((1001, 1001))
    weights[1000, 3] = 1.0
    shown = Parsed(plots.matrix({'a': weights}))
    image, = shown.images('image', 'href')
    alpha = np.asarray(image.convert('RGBA'))[..., 3]
    factor = math.ceil(1001 / plots.MATRIX_SIZE)
    assert image.width == math.ceil(1001 / factor) <= plots.MATRIX_SIZE
    assert np.argwhere(alpha).tolist() == [[1000 // factor, 3 // factor]]
    drawn, = shown.find('image')
    # Padding to whole blocks does not stretch the map.
    assert float(drawn.attributes['width']) == pytest.approx(
        300 * image.width * factor / 1001, abs=0.05)


@pytest.mark.parametrize('value, text', [
    (0, '0'), (12345, '12,345'), (2.31249, '2.312'), (0.001, '0.001'), (3.14e-5, '3.14e-5'),
    (-1234.5, '-1,234'), (3e12, '3e12'), (math.nan, 'NaN'), (math.inf, '∞'), (-math.inf, '−∞'),
    (np.float32(0.1), '0.1'), (True, '1')])
def test_numbers(value, text):
    assert plots.number(value) == text


@pytest.mark.parametrize('seconds, text', [
    (0, '0.0 s'), (59.94, '59.9 s'), (59.96, '1 min 00 s'), (187.4, '3 min 07 s'),
    (3599.7, '1 h 00 min'), (90_000, '25 h 00 min')])
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_table_aligns_numbers_and_names_verdicts():
    shown = Parsed(report.table([['a', 1.5, True, '97 %'], ['b', None, False, '> 3']],
                                ['name', 'loss', 'met', 'text']))
    assert [('n' in e.kind) for e in shown.find('th')] == [False, True, False, False]
    assert [e.text for e in shown.find('td')] == ['a', '1.5', 'right', '97 %',
                                                  'b', '', 'wrong', '> 3']
    with pytest.raises(ValueError):
        report.table([['a', 1]], ['only one'])


def test_stages_follow_each_other():
    shown = Parsed(report.stages({'a': 10, 'b': 30, 'c': 60}))
    bars = [re.findall(r'([\d.]+)%', e.attributes['style']) for e in shown.find('i')]
    assert [tuple(map(float, bar)) for bar in bars] == [(0, 10), (10, 30), (40, 60)]
    assert shown.find('span', 'total')[1].text == '1 min 40 s'


def test_write_replaces_the_page_at_once(tmp_path, monkeypatch):
    path = tmp_path / 'report.html'
    report.write(path, 'old')
    report.write(path, 'new \udc80 café')  # a lone surrogate, as from a file name
    assert path.read_text(encoding='utf-8') == 'new ? café'
    assert os.listdir(tmp_path) == ['report.html']

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        report.write(path, 'half')
    assert path.read_text(encoding='utf-8') == 'new ? café'


def test_metrics_survive_a_killed_writer(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    assert report.read_metrics(path) == []
    path.write_bytes(b'{"kind": "train", "step": 1, "loss": NaN}\n{"kind": "tr{"kind": "train"}\n'
                     b'[1]\n{"loss": 3}\n\xff\xfe\n{"kind": "valid", "step": 2, "loss": 3}\n'
                     b'{"kind": "train", "step": 3, "lo')
    first, second = report.read_metrics(path)
    assert first['step'] == 1 and math.isnan(first['loss'])
    assert second == {'kind': 'valid', 'step': 2, 'loss': 3}


def run_directory(tmp_path, records, snapshot=None, about=None):
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (tmp_path / 'metrics.jsonl').write_text(lines)
    if snapshot is not None:
        np.savez(tmp_path / 'snapshot.npz', **snapshot)
        (tmp_path / 'snapshot.json').write_text(json.dumps(about))
    return tmp_path


def test_run_page_groups_metrics(tmp_path):
    records = [{'kind': 'train', 'step': s, 'time': 2.0 * s, 'loss': 5.0 / s, 'codebook/used': 100.,
                'codebook/perplexity': 9.0, 'text/loss': 1.0, 'alarm/collapse': float(s == 20),
                'alarm/silent': 0.0} for s in (10, 20, 30)]
    records.insert(2, {'kind': 'valid', 'step': 20, 'time': 40.0, 'loss': 0.5})
    # Killed after step 30 and resumed from step 20, which repeats and corrects step 30.
    records.append({**records[-1], 'loss': 0.125})
    (tmp_path / 'config.json').write_text('{"name": "<b>"}')
    page = Parsed(report.run_page(run_directory(tmp_path, records)))
    assert page.find('h1')[0].text == tmp_path.name
    assert 'Step 30 after 1 min 00 s' in page.text
    assert [e.text for e in page.find('h2')] == ['Training', 'Codebook', 'Configuration']
    assert [e.text for e in page.find('h3')] == ['loss', 'text/loss', 'used', 'perplexity']
    loss = page.find('figure', 'chart')[0].text
    assert re.search('train0.1250.1250.5', loss) and re.search('valid0.50.50.5', loss)
    notes = [e.text for e in page.find('p', 'alarm')]
    assert notes == ['Alarm: collapse was 1 at step 20.']
    assert page.find('pre')[0].text == '{"name": "<b>"}' and page.find('details')


def test_run_page_draws_a_snapshot_by_kind(tmp_path):
    rng = np.random.default_rng(6)
    arrays = {'images/original': rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8),
              'images/reconstruction': rng.random((3, 4, 4, 3), np.float32),
              'images/samples': rng.random((40, 4, 4, 3), np.float32),
              'counts/codes': np.arange(10), 'matrix/row': np.tril(np.ones((6, 6)))}
    about = {'step': 1200, 'captions': ['a', 'b', ATTACK], 'boundary': 2}
    page = Parsed(report.run_page(run_directory(tmp_path, [], arrays, about)))
    assert 'No metrics yet' in page.text and 'Taken at step 1,200.' in page.text
    pairs, samples = page.find('div', 'examples')
    assert pairs.attributes['style'] == '--k:2' and ATTACK in pairs.text
    assert ATTACK not in samples.text  # forty samples have not these three captions
    np.testing.assert_array_equal(np.asarray(page.images()[2]), arrays['images/original'][1])
    assert len(page.images()) == 6 + report.EXAMPLES
    assert '9 of 10 codes used' in page.text and len(page.images('image', 'href')) == 1
    assert len(page.find('figure', 'matrix')) == 1 == len(page.find('figure', 'chart'))


def test_run_page_of_a_run_that_has_only_begun(tmp_path):
    assert 'No metrics yet' in Parsed(report.run_page(tmp_path)).text
    run_directory(tmp_path, [{'kind': 'train', 'step': 1, 'loss': None}],
                  {'images/a': np.zeros((2, 4, 4, 3))}, {'step': 1})
    stored = (tmp_path / 'snapshot.npz').read_bytes()
    (tmp_path / 'snapshot.npz').write_bytes(stored[:len(stored) // 2])
    page = Parsed(report.run_page(tmp_path))
    assert 'The snapshot cannot be drawn' in page.find('p', 'alarm')[0].text
    assert '1 value is not finite' in page.text
    np.savez(tmp_path / 'snapshot.npz', **{'images/a': np.zeros((2, 4, 4))})
    assert 'a picture has shape [H, W, 3]' in Parsed(report.run_page(tmp_path)).text
