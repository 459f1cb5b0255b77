"""Pages are read back: figures as XML, tables by their cells, against values in closed form."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax import compare, config, plots, runs
from tests.test_plots import axes_of, find, runs_of
from tests.test_report import Parsed

HOSTILE = 'a <script>alert("x")<' + '\\' + 'script> & \' "b"'


@pytest.fixture(scope='module')
def experiment():
    return config.resolve(config.load('experiments/dalle.py:scenes', {'loop.steps': 1000}))


def make(path, experiment, records, **changes):
    """A run's directory."""
    path.mkdir()
    (path / 'config.json').write_text(config.to_json(dataclasses.replace(experiment, **changes)))
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def logged(steps, loss, valid=(), **metrics):
    """Lines at `steps`; loss and metrics are functions of the step, valid is step -> loss."""
    lines = [{'kind': 'train', 'step': s, 'time': 36.0 * s, 'loss': loss(s),
              **{name: value(s) for name, value in metrics.items()}} for s in steps]
    return lines + [{'kind': 'valid', 'step': s, 'time': 36.0 * s, 'loss': value,
                     'text': value / 2, 'text_accuracy': 0.5} for s, value in dict(valid).items()]


def draw(tmp_path, *paths):
    compare.run(paths, tmp_path / 'new' / 'compare.html')
    html = (tmp_path / 'new' / 'compare.html').read_text()
    figures = [xml.fromstring(part) for part in re.findall('<figure.*?</figure>', html, re.S)]
    return Parsed(html), {figure.find('h3').text: figure for figure in figures}


def tables(html):
    """Heading of the section -> rows of cells."""
    found = {}
    for part in html.split('<section>')[1:]:
        rows = re.findall('<tr>(.*?)</tr>', part.partition('<div class="scroll">')[2], re.S)
        cells = [[''.join(Parsed(cell).text) for cell in re.findall('<t[hd][^>]*>(.*?)</t[hd]>', r)]
                 for r in rows]
        found[re.search('<h2>(.*?)</h2>', part)[1]] = cells
    return found


def read_tables(tmp_path):
    return tables((tmp_path / 'new' / 'compare.html').read_text())


def test_figures_show_what_was_logged(tmp_path, experiment):
    a = make(tmp_path / 'a', experiment, logged(
        range(10, 1010, 10), lambda s: 8 - s / 200, {500: 6.0, 1000: 4.0}, text=lambda s: s / 100,
        gradient_norm=lambda s: 1 + s / 1000, tokens_per_second=lambda s: 500.0))
    b = make(tmp_path / 'b', experiment, logged(
        range(25, 525, 25), lambda s: 9 - s / 100, {500: 5.0}, skipped=lambda s: 0.25,
        text=lambda s: None if s == 100 else s / 50))
    page, figures = draw(tmp_path, a, b)
    assert [e.text for e in page.find('h2')] == [
        'Final values', 'What differs', 'Loss', 'Its terms and other metrics',
        'Stability and speed']
    assert list(figures) == [
        'loss, train', 'loss, valid', 'text, train', 'text, valid', 'gradient_norm, train',
        'skipped, train', 'tokens_per_second, train']
    for title, lines in {
            'loss, train': {'s0': [(s, 8 - s / 200) for s in range(10, 1010, 10)],
                            's1': [(s, 9 - s / 100) for s in range(25, 525, 25)]},
            'loss, valid': {'s0': [(500, 6), (1000, 4)], 's1': [(500, 5)] * 2},
            'text, train': {'s0': [(s, s / 100) for s in range(10, 1010, 10)],
                            's1': [(s, s / 50) for s in range(25, 525, 25) if s != 100]},
            'text, valid': {'s0': [(500, 3), (1000, 2)], 's1': [(500, 2.5)] * 2},
            # Colours belong to runs, whichever of them a figure has.
            'skipped, train': {'s1': [(s, 0.25) for s in range(25, 525, 25)]}}.items():
        to_step, to_value = axes_of(figures[title])
        paths = find(figures[title], 'path')
        assert [path.get('class') for path in paths] == list(lines)
        for path, points in zip(paths, lines.values()):
            shown, points = np.concatenate(runs_of(path.get('d'))), np.array(points, float)
            np.testing.assert_allclose(to_step(shown[:, 0]), points[:, 0], atol=2)
            np.testing.assert_allclose(to_value(shown[:, 1]), points[:, 1], atol=0.02)
        names = {'s0': 'a', 's1': 'b'}
        assert [find(row, 'td')[0].find('i').tail for row in find(figures[title], 'tr')[1:]] == [
            names[line] for line in lines]


def test_final_values_are_those_of_the_tail_and_relative_to_the_first_run(tmp_path, experiment):
    # Over the last tenth of 1000 steps, 910 to 1000, a loss of s / 100 has the mean 9.55; with
    # every 20th step, 920 to 1000, 0.024 * 960 / 2 = 11.52 is 20.63 % more.
    a = make(tmp_path / 'a', experiment, logged(
        range(10, 1010, 10), lambda s: s / 100, {500: 1.0, 1000: 4.0}, text=lambda s: 1.0,
        gradient_norm=lambda s: 2.0, skipped=lambda s: 0.5 * (s <= 100),
        tokens_per_second=lambda s: None if s == 10 else 100.0 * (1 + (s > 500))))
    b = make(tmp_path / 'b', experiment, logged(
        range(20, 1020, 20), lambda s: 0.012 * s, {1000: 3.0}, text=lambda s: 1.0), seed=3)
    c = make(tmp_path / 'c', experiment, logged([100], lambda s: 9.55))
    draw(tmp_path, a, b, c)
    assert read_tables(tmp_path)['Final values'] == [
        ['', 'a', 'b', 'c'], ['steps done', '1,000', '1,000', '100'],
        ['steps planned', '1,000', '1,000', '1,000'], ['hours', '10', '10', '1'],
        ['training loss', '9.55', '11.52', '9.55'],
        ['training loss, against a', '', '+20.63 %', '+0.00 %'],
        ['validation loss', '4', '3', ''], ['validation loss, against a', '', '-25.00 %', ''],
        ['text, valid', '2', '1.5', ''], ['gradient norm', '2', '', ''],
        ['steps skipped', '5.00 %', '', ''], ['tokens/s', '200', '', '']]
    page, _ = draw(tmp_path, b, a)
    assert 'different numbers of steps' not in page.text
    page, _ = draw(tmp_path, b, c)
    assert 'different numbers of steps' in page.text


def test_a_resumed_run_counts_its_later_lines_and_a_diverged_one_is_told(tmp_path, experiment):
    lines = (logged([100, 190, 200], lambda s: 50.0, skipped=lambda s: 0.5)
             + logged([190, 200], lambda s: s / 100, skipped=lambda s: 0.1))
    a = make(tmp_path / 'a', experiment, lines)
    b = make(tmp_path / 'b', experiment, logged(
        [100, 200], lambda s: float('nan') if s > 100 else 1.0))
    c = make(tmp_path / 'c', experiment, logged(
        [100, 190, 200], lambda s: 5.0 if s == 190 else float('inf')))
    draw(tmp_path, a, b, c)
    rows = {row[0]: row[1:] for row in read_tables(tmp_path)['Final values']}
    assert rows['training loss'] == ['1.95', 'NaN', '5']
    assert rows['training loss, against a'] == ['', '', '+156.41 %']
    assert rows['steps skipped'] == ['30.00 %', '', '']  # 50 and 10 of 200


def test_the_keys_that_differ_and_no_others(tmp_path, experiment):
    one = logged([10], lambda s: 1.0)
    a = make(tmp_path / 'a', experiment, one)
    optimizer = dataclasses.replace(experiment.optimizer, peak_lr=0.00012345)
    b = make(tmp_path / 'b', experiment, one, optimizer=optimizer, seed=5)
    c = make(tmp_path / 'c', experiment, one, precision='float32', seed=6,
             frozen={'image': '', 'other': HOSTILE})
    draw(tmp_path, a, b, c)
    lr, image = json.dumps(experiment.optimizer.peak_lr), experiment.frozen['image']
    assert read_tables(tmp_path)['What differs'] == [
        ['key', 'a', 'b', 'c'], ['frozen.image', image, image, '""'],
        ['frozen.other', '', '', HOSTILE], ['frozen.text', '""', '""', ''],
        ['optimizer.peak_lr', lr, '0.00012345', lr],
        ['precision', experiment.precision, experiment.precision, 'float32'],
        ['seed', str(experiment.seed), '5', '6']]
    same = make(tmp_path / 'same', experiment, one)
    page, _ = draw(tmp_path, a, same)
    assert 'the same in every key' in page.text


def test_names_are_text(tmp_path, experiment):
    one = logged([10, 20], lambda s: 1.0 / s, {20: 1.0})
    a, b = (make(tmp_path / name, experiment, one) for name in (HOSTILE, 'b'))
    page, figures = draw(tmp_path, a, b)
    assert page.text.count(HOSTILE) >= 5
    assert all(HOSTILE in ''.join(figure.itertext()) for figure in figures.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from('ab'), min_size=1, max_size=4).map(
    lambda parts: Path('/', *parts)), min_size=2, max_size=6, unique=True))
def test_names_are_the_shortest_ends_that_no_other_path_has(paths):
    names = runs.distinct_names(paths)
    assert len(set(names)) == len(paths)
    for path, name in zip(paths, names):
        parts, ending = path.parts, Path(name).parts
        assert parts[-len(ending):] == ending
        for other in paths:
            assert other == path or other.parts[-len(ending):] != ending
        shorter = ending[1:]
        assert not shorter or any(other != path and other.parts[-len(shorter):] == shorter
                                  for other in paths)


def test_names_of_runs_in_like_directories():
    paths = [Path('/x/one/dalle'), Path('/x/two/dalle'), Path('/x/clip')]
    assert runs.distinct_names(paths) == ['one/dalle', 'two/dalle', 'clip']


@pytest.mark.parametrize('value, first, told', [
    (3.0, 2.0, '+50.00 %'), (1.99, 2.0, '-0.50 %'), (2.0, 2.0, '+0.00 %'), (-3.0, -2.0, '-50.00 %'),
    (1.99999, 2.0, '+0.00 %'),
    (1.0, 0.0, None), (None, 2.0, None), (2.0, None, None), (np.nan, 2.0, None)])
def test_changes_in_percent(value, first, told):
    assert compare.change(value, first) == told


def test_what_cannot_be_compared_is_named_before_anything_is_written(tmp_path, experiment):
    good = make(tmp_path / 'good', experiment, logged([10], lambda s: 1.0))
    loop = dataclasses.replace(experiment.loop, log_every=70)
    fresh = make(tmp_path / 'fresh', experiment, [], loop=loop)
    only_valid = make(tmp_path / 'valid', experiment, logged([], None, {10: 1.0}))
    broken = make(tmp_path / 'broken', experiment, logged([10], lambda s: 1.0))
    (broken / 'config.json').write_text('{"model": "dalle", "sed": 1}')
    (tmp_path / 'link').symlink_to(good)
    out = tmp_path / 'new' / 'compare.html'
    for paths, error, told in (
            ([good], ValueError, 'compare: 1; name the directories of 2 to 6'),
            ([], ValueError, 'compare: 0'), ([good] * 7, ValueError, 'compare: 7'),
            ([good, tmp_path / 'link'], ValueError, 'link is given twice'),
            ([good, tmp_path / 'nothing'], runs.RunError, 'nothing is not a run.*Train it first'),
            ([good, tmp_path], runs.RunError, f'{tmp_path.name} is not a run'),
            ([broken, good], runs.RunError, "broken/config.json cannot be read"),
            ([good, fresh], runs.RunError, 'fresh has not logged a step yet; wait.*log_every=70'),
            ([only_valid, good], runs.RunError, 'valid has not logged a step yet')):
        with pytest.raises(error, match=told):
            compare.run(paths, out)
    with pytest.raises(ValueError, match=f'--out={good} is a directory'):
        compare.run([good, only_valid], good)
    assert not out.parent.exists()
    assert plots.COLOURS == 6


def test_the_command(tmp_path, experiment):
    one = logged([10, 20], lambda s: 1.0 / s)
    for name in 'ab':
        make(tmp_path / name, experiment, one)
    root = Path(__file__).parent.parent
    command = [sys.executable, '-m', 'dalle_jax.compare', 'a', 'b', '--out', 'page.html']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(root)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'wrote page.html\n'
    assert 'b against a' in Parsed((tmp_path / 'page.html').read_text()).text
