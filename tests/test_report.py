"""Pages are checked as a browser meets them: parsed strictly, pictures decoded from their URIs."""

import base64
import io
import json
import math
import os
import re
import types
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dalle_jax import plots, report
from tests.test_plots import axes_of, find, runs_of

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}
ATTACK = '</title><script>alert("x")</script><img src=x onerror=alert(1)> & \' "'


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


def everything(rng) -> list[str]:
    images = rng.integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    line = np.arange(300), rng.normal(size=300)
    return [
        report.facts({ATTACK: ATTACK, 'right': report.Fact(0.97, ATTACK, True), 'n': 12345}),
        report.note(ATTACK), report.note(ATTACK, alarm=True), report.stages({ATTACK: 2, 'b': 70}),
        report.table([[ATTACK, 1.5, True], ['b', None, False]], [ATTACK, 'value', 'met']),
        report.section(ATTACK, ATTACK,
                       report.curves({ATTACK: line}, ATTACK, ATTACK, ATTACK),
                       report.curves({ATTACK: line}, ATTACK, ATTACK, ATTACK, ramp=True),
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


def test_the_ramp_of_colours_keeps_its_contrast_and_brightens_in_either_theme():
    number = r'([.\d]+)'
    rising = re.escape('oklch(calc(var(--from) + (var(--to) - var(--from)) * var(--t))')
    chroma, hue, turn = map(float, re.search(
        rf'{rising} {number}\s+calc\({number} \+ {number} \* var\(--t\)\)', plots.STYLE).groups())
    ends = re.search(rf'in oklch increasing hue,\s+oklch\(var\(--from\) {number} {number}\), '
                     rf'oklch\(var\(--to\) {number} {number}\)', plots.STYLE).groups()
    assert tuple(map(float, ends)) == (chroma, hue, chroma, (hue + turn) % 360)  # the legend's

    def luminance(lightness, hue):
        """Of an OKLCH colour, clipped to the gamut: through LMS to linear sRGB (Ottosson 2020)."""
        a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
        lms = np.array([lightness + 0.3963377774 * a + 0.2158037573 * b,
                        lightness - 0.1055613458 * a - 0.0638541728 * b,
                        lightness - 0.0894841775 * a - 1.2914855480 * b]) ** 3
        rgb = np.array([[4.0767416621, -3.3077115913, 0.2309699292],
                        [-1.2684380046, 2.6097574011, -0.3413193965],
                        [-0.0041960863, -0.7034186147, 1.7076147010]]) @ lms
        return rgb.clip(0, 1).T @ [0.2126, 0.7152, 0.0722]

    for part in re.findall(r':root \{(.*?)\}', report.STYLE, re.S):
        low, high = (float(re.search(rf'--{name}: {number}', part)[1]) for name in ('from', 'to'))
        paper = int(re.search(r'--paper: #(\w\w)', part)[1], 16) / 255
        paper = paper / 12.92 if paper < 0.04 else ((paper + 0.055) / 1.055) ** 2.4  # it is grey
        t = np.linspace(0, 1, 64)
        shades = np.array([luminance(low + (high - low) * at, hue + turn * at) for at in t])
        assert (np.diff(shades) > 0).all()
        bright, dim = np.maximum(shades, paper), np.minimum(shades, paper)
        assert ((bright + 0.05) / (dim + 0.05)).min() >= 3


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
    (lambda: report.candidates('c', np.zeros((2, 4, 4, 3)), [1.0], None, 0), "'scores': 1")])
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


def scale_records(layers):
    """Windows of 10, 10 and 5 steps; the middle one was logged twice, by a run that resumed."""
    rng = np.random.default_rng(8)
    records, scales = [], {}
    for step, skipped in ((10, 0.2), (20, 0.9), (20, 0.1), (25, 0.6)):
        record = {'kind': 'train', 'step': step, 'time': 1.0, 'loss': 2.0, 'skipped': skipped}
        for layer in range(layers):
            for branch in ('attention', 'mlp'):
                value = 13 + 0.1 * layer + rng.random()
                record[f'log2_scale/{layer:02}/{branch}'] = value
                scales.setdefault((branch, layer), {})[step] = value
        records.append(record)
    records[0] |= {'overflow/00/mlp': 2.0, 'overflow/01/attention': 1.0}
    records[1] |= {'overflow/00/attention': 9.0, 'overflow/01/mlp': 9.0}
    records[2] |= {'overflow/00/mlp': 1.0}
    records[3] |= {'overflow/00/mlp': 3.0, 'overflow/01/attention': 2.0}
    return records, scales


@pytest.mark.parametrize('layers', [2, 64, 101])  # '100' stands behind '99'
def test_run_page_draws_gradient_scales_by_depth_and_skips_by_block(tmp_path, layers):
    records, scales = scale_records(layers)
    html = report.run_page(run_directory(tmp_path, records))
    page = Parsed(html)
    assert [e.text for e in page.find('h2')] == ['Training', 'Gradient scales']
    assert [e.text for e in page.find('h3')] == [
        'loss', 'skipped', 'attention: log2 of the scale', 'mlp: log2 of the scale',
        'Updates skipped because of a block']
    # (10 * 0.2 + 10 * 0.1 + 5 * 0.6) / 25 steps
    assert '24.00% of updates were skipped.' in page.text
    *_, attention, mlp, skips = map(xml.fromstring, re.findall('<figure.*?</figure>', html, re.S))
    for branch, chart in (('attention', attention), ('mlp', mlp)):
        to_step, to_value = axes_of(chart)
        paths = find(chart, 'path', 'ramp')
        assert len(paths) == layers
        for layer, path in enumerate(paths):
            points, = runs_of(path.get('d'))
            np.testing.assert_allclose(to_step(points[:, 0]), [10, 20, 25], atol=0.1)
            np.testing.assert_allclose(to_value(points[:, 1]),
                                       [scales[branch, layer][s] for s in (10, 20, 25)], atol=0.1)
    to_layer, to_count = axes_of(skips)
    for path, first in zip(find(skips, 'path'), ([0, 3], [6, 0])):
        points, = runs_of(path.get('d'))
        np.testing.assert_allclose(to_layer(points[:, 0]), range(layers), atol=0.2)
        np.testing.assert_allclose(to_count(points[:, 1]), first + [0] * (layers - 2), atol=0.1)
    told = [e.text for e in find(skips, 'title')]
    assert told[0] == 'layer 0\nattention 0\nmlp 6' and (
        layers > 64 or told[1] == 'layer 1\nattention 3\nmlp 0')


def test_a_scaled_run_without_a_skip_says_so(tmp_path):
    records = [{'step': 10, 'skipped': 0.0, 'log2_scale/00/mlp': 13.0}]
    page = Parsed(report.run_page(run_directory(tmp_path, records)))
    assert '0.00% of updates were skipped.' in page.text
    assert len(page.find('figure', 'chart')) == 3


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
