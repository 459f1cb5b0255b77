"""Votes against brute force and scipy; the judges' page as a browser runs it."""

import base64
import functools
import hashlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import stats

from dalle_jax import vote, vote_count
from dalle_jax.vote_count import Key, Votes, count, majority, read_key, read_votes, wilson
from tests import browser
from tests.test_compare import tables
from tests.test_report import Parsed

HOSTILE = '</script><img src=x onerror="alert(1)"> & \' "b" \\u003c é 猫'
SIDES = {'first': ('left', 'right'), 'second': ('right', 'left')}


def samples(path, captions, seed, secret='secret', keep=2):
    """A directory as `sample` leaves it; the files say where they come from."""
    path.mkdir(parents=True)
    rng, lines, about = np.random.default_rng(seed), [], PngInfo()
    about.add_text('made by', secret)
    for i, caption in enumerate(captions):
        for rank in range(keep):
            file = f'{i:05}-{rank:03}.png'
            image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(image).save(path / file, pnginfo=about, icc_profile=secret.encode())
            lines.append(json.dumps({'file': file, 'caption': caption, 'rank': rank}))
    (path / 'samples.jsonl').write_text('\n'.join(lines) + '\n')
    return path


def shown(html):
    """The comparisons inside a page."""
    return [json.loads(text) for text in re.findall(
        r'<script type="application/json" class="pair" data-id="\d+">(.*?)</script>', html)]


def pixels(uri):
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix('data:image/png;base64,'))))
    assert not image.info
    return np.asarray(image)


# -- counting -------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(vote_count.OUTCOMES), max_size=8))
def test_majority_is_more_than_half(votes):
    found = majority({answer: votes.count(answer) for answer in vote_count.OUTCOMES})
    modes = statistics.multimode(votes)
    if len(modes) == 1 and votes.count(modes[0]) > len(votes) - votes.count(modes[0]):
        assert found == modes[0]
    else:
        assert found is None


@pytest.mark.parametrize('votes', range(32))
def test_the_majority_of_five_votes_for_two_is_their_median(votes):
    sides = [votes >> i & 1 for i in range(5)]
    found = majority({'first': sides.count(0), 'second': sides.count(1)})
    assert found == ('first', 'second')[statistics.median(sides)]


@given(st.data())
def test_wilson_is_scipys(data):
    n = data.draw(st.integers(1, 5000))
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    np.testing.assert_allclose((low, high), stats.binomtest(k, n).proportion_ci(method='wilson'),
                               atol=1e-12)
    assert 0 <= low <= k / n <= high <= 1
    np.testing.assert_allclose(wilson(n - k, n), (1 - high, 1 - low), atol=1e-12)


def test_wilson_without_trials():
    assert wilson(0, 0) is None


@st.composite
def polls(draw):
    """(left run of each comparison, judge -> {(i, question): (side, seconds)}, excluded judges)."""
    lefts = draw(st.lists(st.sampled_from(['first', 'second']), min_size=1, max_size=5))
    judges = {}
    for j in range(draw(st.integers(1, 6))):
        answers = {}
        for i in range(len(lefts)):
            for question, options in (('realism', ('left', 'right', None)),
                                      ('caption', ('left', 'right', 'neither', None))):
                side = draw(st.sampled_from(options))
                if side:
                    answers[i, question] = side, draw(st.integers(0, 80)) / 8
        if answers:
            judges[f'judge {j}'] = answers
    excluded = draw(st.lists(st.sampled_from([*judges]), unique=True)) if judges else []
    return lefts, judges, excluded


def key_of(lefts, runs=('run a', 'run b')):
    return Key('0123456789abcdef', runs, {f'{i:04}': {
        'caption': f'caption {i}', 'left': left, 'files': ['a.png', 'b.png']}
        for i, left in enumerate(lefts, start=1)})


def write_votes(folder, judge, answers, page='0123456789abcdef', name=None):
    file = folder / (name or f'votes-{judge}.json')
    file.write_text(json.dumps({'page': page, 'judge': judge, 'votes': [
        {'id': f'{i + 1:04}', 'question': question, 'answer': side, 'seconds': seconds}
        for (i, question), (side, seconds) in answers.items()]}))
    return file


def through_files(lefts, judges):
    with tempfile.TemporaryDirectory() as folder:
        folder, key = Path(folder), key_of(lefts)
        (folder / 'key.json').write_text(json.dumps(key._asdict()))
        assert read_key(folder / 'key.json') == key
        return read_votes([write_votes(folder, *item) for item in judges.items()], key), key


@settings(max_examples=80, deadline=None)
@given(polls())
def test_counting_is_brute_force(poll):
    lefts, judges, excluded = poll
    counting = [judge for judge in judges if judge not in excluded]
    assume(counting)
    result = count(*through_files(lefts, judges), excluded)

    def meant(judge, i, question):
        side, _ = judges[judge].get((i, question), (None, 0))
        if side in (None, 'neither'):
            return side
        return 'first' if side == SIDES[lefts[i]][0] else 'second'

    def verdict(votes):
        return next((v for v in set(votes) if votes.count(v) / len(votes) > 0.5), 'none')

    for question in ('realism', 'caption'):
        piles = [[v for judge in counting if (v := meant(judge, i, question))]
                 for i in range(len(lefts))]
        found = result['questions'][question]
        every = sum(piles, [])
        for part, least in (('all', 1), ('full', 5)):
            chosen = [verdict(pile) for pile in piles if len(pile) >= least]
            assert found[part]['comparisons'] == len(chosen)
            for answer, n in found[part]['majorities'].items():
                assert n == chosen.count(answer)
                if chosen:
                    assert found[part]['shares'][answer] == pytest.approx(n / len(chosen))
            assert sum(found[part]['majorities'].values()) == len(chosen)
        assert ('neither' in found['votes']) == (question == 'caption')
        for answer, n in found['votes'].items():
            assert n == every.count(answer)
            if every:
                assert found['vote_shares'][answer] == pytest.approx(n / len(every))
        assert found['comparisons_by_votes'] == {
            str(n): sum(len(pile) == n for pile in piles)
            for n in sorted({len(pile) for pile in piles})}

    for judge, answers in judges.items():
        same = []
        for i, question in answers:
            others = [v for other in counting
                      if other != judge and (v := meant(other, i, question))]
            if others and verdict(others) != 'none':
                same.append(verdict(others) == meant(judge, i, question))
        found, seconds = result['judges'][judge], [s for _, s in answers.values()]
        assert found['votes'] == len(answers) and found['excluded'] == (judge in excluded)
        assert found['median_seconds'] == statistics.median(seconds)
        assert found['fast_share'] == pytest.approx(sum(s < 4 for s in seconds) / len(seconds))
        assert found['fast'] == (statistics.median(seconds) < 4)
        assert (found['compared'], found['agreed']) == (len(same), sum(same))

    # Had the runs changed places, so would their shares, and nothing else.
    flipped = count(*through_files(['first' if left == 'second' else 'second' for left in lefts],
                                   judges), excluded)
    assert flipped['judges'] == result['judges']
    for question, found in result['questions'].items():
        other = flipped['questions'][question]
        assert other['comparisons_by_votes'] == found['comparisons_by_votes']
        for part in ('all', 'full'):
            a, b = found[part]['majorities'], other[part]['majorities']
            assert b == {**a, 'first': a['second'], 'second': a['first']}


def panel():
    """Seven judges of 20 comparisons; the last one answers at random, and fast."""
    rng, lefts = np.random.default_rng(0), ['first', 'second'] * 10
    judges = {}
    for j in range(7):
        answers = {}
        for i in range(20):
            for question in ('realism', 'caption'):
                good = SIDES[lefts[i]][0] if j < 6 else rng.choice(['left', 'right'])
                answers[i, question] = str(good), 2.0 if j in (5, 6) else 8.0
        judges[f'judge {j}'] = answers
    return lefts, judges


def test_who_disagrees_and_is_fast_is_pointed_out_and_stays_in():
    lefts, judges = panel()
    result = count(*through_files(lefts, judges))
    assert [(f['low'], f['fast']) for f in result['judges'].values()] == [
        (False, False)] * 5 + [(False, True), (True, True)]
    assert [text.split(' agrees')[0] for text in vote._alarms(result)] == ['judge 6']
    assert result['questions']['realism']['votes'] == {
        'first': 120 + sum(side == SIDES[lefts[i]][0]
                           for (i, q), (side, _) in judges['judge 6'].items() if q == 'realism'),
        'second': sum(side != SIDES[lefts[i]][0]
                      for (i, q), (side, _) in judges['judge 6'].items() if q == 'realism')}
    without = count(*through_files(lefts, judges), ['judge 6'])
    assert without['questions']['realism']['votes'] == {'first': 120, 'second': 0}
    assert without['judges']['judge 6']['excluded'] and not vote._alarms(without)
    # Few votes are no proof of disagreement.
    for votes in (9, 10):
        judges['judge 6'] = {(i, 'realism'): (SIDES[lefts[i]][1], 1.0) for i in range(votes)}
        few = count(*through_files(lefts, judges))['judges']['judge 6']
        assert few['agreement'] == 0 and few['low'] == (votes == 10)
    # Of those who always agree 90 % are ten points less; 7 of 10 may be 89.2 %, and 8 be 94.3 %.
    for right in (7, 8):
        judges['judge 6'] = {(i, 'realism'): (SIDES[lefts[i]][i >= right], 1.0) for i in range(10)}
        found = count(*through_files(lefts, judges))['judges']['judge 6']
        assert found['low'] == (right == 7)


def test_what_cannot_be_counted_is_named(tmp_path):
    key = key_of(['first', 'second'])
    good = {(0, 'realism'): ('left', 3.0)}
    file = write_votes(tmp_path, 'Ada', good)

    def broken(change, name='broken.json'):
        values = json.loads(file.read_text())
        change(values)
        (tmp_path / name).write_text(json.dumps(values))
        return tmp_path / name

    def line(**changes):
        return broken(lambda values: values['votes'][0].update(changes))

    (tmp_path / 'half.json').write_text(file.read_text()[:40])
    (tmp_path / 'list.json').write_text('[1]')
    (tmp_path / 'latin.json').write_bytes(b'{"page": "\xff"}')
    (tmp_path / 'key.json').write_text(json.dumps(key._asdict()))
    for files, told in (
            (lambda: [], 'no votes to count'),
            (lambda: [tmp_path / 'none.json'], 'none.json cannot be read.*No such file'),
            (lambda: [tmp_path / 'half.json'], 'half.json cannot be read as votes'),
            (lambda: [tmp_path / 'list.json'], 'list.json cannot be read as votes'),
            (lambda: [tmp_path / 'latin.json'], 'latin.json cannot be read as votes'),
            (lambda: [tmp_path / 'key.json'], "key.json cannot be read as votes.*'judge' is miss"),
            (lambda: [broken(lambda v: v.update(judge=' '))], "judge is ' '"),
            (lambda: [broken(lambda v: v.update(page='f' * 16))], 'page ffff.*key is of 0123'),
            (lambda: [broken(lambda v: v.update(votes=[]))], 'broken.json holds no votes'),
            (lambda: [broken(lambda v: v.update(votes=v['votes'] * 2))],
             "vote 2 is the second one on '0001', 'realism'"),
            (lambda: [line(id='0003')], "vote 1 is on '0003', 'realism'"),
            (lambda: [line(id=['0001'])], 'vote 1 is damaged'),
            (lambda: [line(question='taste')], "vote 1 is on '0001', 'taste'"),
            (lambda: [line(answer='neither')], "vote 1 is damaged.*'neither'"),
            (lambda: [line(answer=[])], 'vote 1 is damaged'),
            (lambda: [line(seconds='soon')], 'vote 1 is damaged'),
            (lambda: [line(seconds=float('nan'))], 'vote 1 is damaged'),
            (lambda: [line(seconds=-1)], 'vote 1 is damaged'),
            (lambda: [broken(lambda v: v['votes'][0].pop('seconds'))], 'vote 1 is damaged'),
            (lambda: [file, write_votes(tmp_path, 'Ada', good, name='again.json')],
             "votes-Ada.json and .*again.json are both of the judge 'Ada'")):
        with pytest.raises(ValueError, match=told):
            read_votes(files(), key)

    votes = read_votes([file], key)
    assert votes == [Votes('Ada', {('0001', 'realism'): ('first', 3.0)})]
    with pytest.raises(ValueError, match='--exclude=Bob: there is no such judge; there are Ada'):
        count(votes, key, ['Bob'])
    with pytest.raises(ValueError, match='leaves no judge'):
        count(votes, key, ['Ada'])
    for text in ('', '{}', '[]', '{"page": "x", "runs": ["a", "b"], "comparisons": []}'):
        (tmp_path / 'bad.json').write_text(text)
        with pytest.raises(ValueError, match='bad.json cannot be read as a key.*--make'):
            read_key(tmp_path / 'bad.json')
    (tmp_path / 'bad.json').write_text(json.dumps(key._asdict()).replace('second', 'third'))
    with pytest.raises(ValueError, match='bad.json is damaged'):
        read_key(tmp_path / 'bad.json')
    for out in (file.with_suffix('.html'), tmp_path / 'key.html', tmp_path / 'votes.txt'):
        with pytest.raises(ValueError, match='--out=.*new .html file'):
            vote.tell([file], tmp_path / 'key.json', [], out)
    assert json.loads(file.read_text())['judge'] == 'Ada'


def test_the_report_tells_shares_intervals_and_the_papers_numbers(tmp_path, capsys):
    # Two comparisons with five votes, for the first run and tied 2:2:1; one with a single vote.
    lefts, judges = ['first', 'second', 'first'], {}
    for j, (a, b) in enumerate(zip(['left', 'left', 'left', 'right', 'right'],
                                   ['left', 'left', 'right', 'right', 'neither'])):
        judges[f'<b>{j}'] = {(0, 'caption'): (a, 5.0), (1, 'caption'): (b, 5.0),
                             (0, 'realism'): (a, 5.0)}
    judges['<b>4'][2, 'caption'] = 'right', 5.0
    (tmp_path / 'vote.key.json').write_text(json.dumps(key_of(lefts)._asdict()))
    files = [write_votes(tmp_path, judge, answers, name=f'{i}.json')
             for i, (judge, answers) in enumerate(judges.items())]
    result = vote.tell(files, tmp_path / 'vote.key.json', [], tmp_path / 'out' / 'votes.html')
    html = (tmp_path / 'out' / 'votes.html').read_text()
    page, found = Parsed(html), tables(html)
    third = '6.1 to 79.2 %'  # Wilson's interval of 1 in 3
    assert found['Which image better matches the caption?'] == [
        ['', 'of 3 comparisons', '95 % interval', 'of 2 with 5 votes or more', '95 % interval',
         'of 11 votes'],
        ['run a', '33.3 % (1)', third, '50.0 % (1)', '9.5 to 90.5 %', '45.5 % (5)'],
        ['run b', '33.3 % (1)', third, '0.0 % (0)', '0.0 to 65.8 %', '45.5 % (5)'],
        ['neither is better', '0.0 % (0)', '0.0 to 56.1 %', '0.0 % (0)', '0.0 to 65.8 %',
         '9.1 % (1)'],
        ['no majority', '33.3 % (1)', third, '50.0 % (1)', '9.5 to 90.5 %', '']]
    assert found['Which image is more realistic?'] == [
        ['', 'of 1 comparisons', '95 % interval', 'of 5 votes'],
        ['run a', '100.0 % (1)', '20.7 to 100.0 %', '60.0 % (3)'],
        ['run b', '0.0 % (0)', '0.0 to 79.3 %', '40.0 % (2)'],
        ['no majority', '0.0 % (0)', '0.0 to 79.3 %', '']]
    assert found['Votes of a comparison'][1:] == [
        ['Which image is more realistic?', '2', '0', '0', '0', '0', '1'],
        ['Which image better matches the caption?', '0', '1', '0', '0', '0', '2']]
    assert [row[:2] for row in found['Judges'][1:]] == [[f'<b>{j}', '3'] for j in range(4)] + [
        ['<b>4', '4']]
    for reference in ('DALL-E 90.0 %, DF-GAN 10.0 %', 'DALL-E 93.3 %, DF-GAN 6.6 %'):
        assert 'For reference, from another experiment' in page.text and reference in page.text
    stored = json.loads((tmp_path / 'out' / 'votes.json').read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored['comparisons']['0002']['caption'] == {
        'votes': {'first': 2, 'second': 2, 'neither': 1}, 'outcome': None}
    printed = capsys.readouterr().out
    for row in (*found['Which image better matches the caption?'], *found['Judges']):
        assert re.search(' +'.join(map(re.escape, filter(None, row))), printed)


# -- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Samples of 40 captions, one of which occurs twice."""
    root = tmp_path_factory.mktemp('drawn')
    captions = [HOSTILE, *(f'caption {i}' for i in range(38)), 'caption 3']
    return [samples(root / name, captions, seed, f'secret {name}')
            for seed, name in enumerate(('run_first', 'run_second'))]


def test_the_page_shows_both_images_of_every_caption_and_the_key_knows_whose(drawn, tmp_path):
    key = vote.make(drawn, tmp_path / 'new' / 'vote.html')
    html = (tmp_path / 'new' / 'vote.html').read_text()
    assert read_key(tmp_path / 'new' / 'vote.key.json') == key
    assert key.runs == ('run_first', 'run_second') and html.isascii()
    best = [line for line in map(json.loads, (drawn[0] / 'samples.jsonl').read_text().splitlines())
            if line['rank'] == 0]
    left = []
    for entry in shown(html):
        known = key.comparisons[entry['id']]
        assert entry['caption'] == known['caption']
        files = [Path(file) for file in known['files']]
        assert [file.parent for file in files] == drawn and files[0].name == files[1].name
        assert {'file': files[0].name, 'caption': entry['caption'], 'rank': 0} in best
        for side, file in zip(SIDES[known['left']], files):
            np.testing.assert_array_equal(pixels(entry[side]), np.asarray(Image.open(file)))
        left.append(known['left'])
    names = [Path(entry['files'][0]).name for entry in key.comparisons.values()]
    assert sorted(names) == sorted(line['file'] for line in best)
    assert names != sorted(names)
    # Both sides equally often, and not in turns.
    assert left.count('first') == left.count('second') == 20
    assert 5 < sum(a == b for a, b in zip(left, left[1:])) < 34
    for secret in ('run_', 'secret', r'first\b', r'second\b', '-000', 'samples', str(tmp_path)):
        assert not re.search(secret, html)
    assert 'http' not in html.replace('http-equiv', '')


def test_the_page_depends_on_the_seed_alone(drawn, tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        vote.make(drawn, tmp_path / name / 'vote.html', seed=seed, limit=11)
    a, b, c = ((tmp_path / name / 'vote.html').read_text() for name in 'abc')
    assert a == b and len(shown(a)) == 11
    assert {e['caption'] for e in shown(a)} != {e['caption'] for e in shown(c)}
    lefts = [e['left'] for e in read_key(tmp_path / 'a' / 'vote.key.json').comparisons.values()]
    assert sorted(map(lefts.count, ('first', 'second'))) == [5, 6]


def test_the_policy_allows_this_script_and_style_and_nothing_else(drawn, tmp_path):
    vote.make(drawn, tmp_path / 'vote.html', limit=2)
    html = (tmp_path / 'vote.html').read_text()
    policy = dict(rule.split(' ', 1) for rule in re.search(
        'Content-Security-Policy" content="(.*?)"', html)[1].split('; '))

    def allowed(text):
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    assert policy == {
        'default-src': "'none'", 'img-src': 'data:', 'base-uri': "'none'", 'form-action': "'none'",
        'style-src': allowed(re.search('<style>(.*?)</style>', html, re.S)[1]),
        'script-src': allowed(re.search('<script>(.*?)</script>', html, re.S)[1])}


def test_a_large_page_is_told(drawn, tmp_path, capsys, monkeypatch):
    vote.make(drawn, tmp_path / 'vote.html')
    assert 'larger than' not in capsys.readouterr().out
    monkeypatch.setattr(vote, 'LARGE', 1000)
    vote.make(drawn, tmp_path / 'vote.html')
    assert '--limit makes it smaller' in capsys.readouterr().out


def test_what_cannot_be_compared_is_named_before_anything_is_written(drawn, tmp_path):
    captions = ['one', 'two', 'two']
    a = samples(tmp_path / 'a', captions, 0)
    other = samples(tmp_path / 'other', ['one', 'zwei', 'two'], 1)
    fewer = samples(tmp_path / 'fewer', captions[:2], 1)
    lost = samples(tmp_path / 'lost', captions, 1)
    (lost / '00002-000.png').write_bytes(b'no image')
    half = samples(tmp_path / 'half', captions, 1)
    (half / 'samples.jsonl').write_text((half / 'samples.jsonl').read_text()[:-20])
    none = samples(tmp_path / 'none', [], 1)
    out = tmp_path / 'new' / 'vote.html'
    for paths, told in (
            ([], 'none; name two'), ([a], 'name two different'), ([a, a, fewer], 'name two'),
            ([a, a / '..' / 'a'], 'name two different'),
            ([a, tmp_path], 'has no samples.jsonl'), ([a, none], 'lists no images'),
            ([a, half], 'line 6 is damaged; if sample was stopped'),
            ([a, other], "caption 1 is 'two' in .*a and 'zwei' in .*other"),
            ([a, fewer], "caption 2, 'two', is in .*a alone"),
            ([fewer, a], "caption 2, 'two', is in .*a alone"),
            ([a, lost], '00002-000.png cannot be read as an image')):
        with pytest.raises(ValueError, match=told):
            vote.make(paths, out)
    with pytest.raises(ValueError, match='--limit=0'):
        vote.make(drawn, out, limit=0)
    with pytest.raises(ValueError, match=f'--make={a} is a directory'):
        vote.make(drawn, a)
    assert not out.parent.exists()
    vote.make(drawn, out)
    before = out.with_suffix('.key.json').read_text()
    with pytest.raises(ValueError, match='vote.key.json is the key of another page'):
        vote.make(drawn, out, seed=1)
    vote.make(drawn, out)  # the same page again is no harm
    assert out.with_suffix('.key.json').read_text() == before


def test_the_commands(drawn, tmp_path):
    root = Path(__file__).parent.parent
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': str(root)})
    command = [sys.executable, '-m', 'dalle_jax.vote']
    done = run([*command, '--make', 'vote.html', *map(str, drawn), '--limit', '3'])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('wrote vote.html, 3 comparisons')
    page = json.loads((tmp_path / 'vote.key.json').read_text())['page']
    for judge in 'AB':
        write_votes(tmp_path, judge, {(0, 'realism'): ('left', 1.0)}, page)
    done = run([*command, '--count', 'votes-A.json', 'votes-B.json', '--key', 'vote.key.json',
                '--exclude', 'B'])
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('wrote votes.html and votes.json\n')
    assert json.loads((tmp_path / 'votes.json').read_text())['excluded'] == ['B']
    done = run([*command, '--count', 'votes-A.json'])
    assert done.returncode == 2 and done.stderr.startswith('vote: --count needs --key')


# -- a judge at the page --------------------------------------------------------------------------

WAIT = 0.32  # seconds; the page takes a faster answer for a double click


@pytest.fixture
def window(tmp_path):
    if not browser.CHROMIUM:
        pytest.skip('no Chromium here')
    opened = browser.Browser(tmp_path)
    yield opened
    opened.close()


def test_a_judge_at_the_page(drawn, tmp_path, window):
    captions = [HOSTILE, 'two', 'three']
    runs = [samples(tmp_path / name, captions, seed) for seed, name in enumerate('ab')]
    key = vote.make(runs, tmp_path / 'vote.html')
    ids, address = [*key.comparisons], (tmp_path / 'vote.html').as_uri()

    def votes():
        return [(v['id'], v['question'], v['answer']) for v in window.run('votes')]

    def begin(name):
        window.open('about:blank')
        window.open(address)
        window.click('#name')
        window.run("document.getElementById('name').select()")
        window.type(name)
        window.key('Enter')
        window.wait("document.getElementById('start').hidden")

    def press(key):
        time.sleep(WAIT)
        window.key(key)

    def click(selector):
        time.sleep(WAIT)
        window.click(selector)

    def visible(selector):
        return window.run(f'document.querySelector({json.dumps(selector)}).checkVisibility()')

    # -- no answer before there is a name, and nothing from outside -------------------------------
    window.open(address)
    window.click('#begin')
    press('ArrowLeft')
    assert visible('#start') and window.run('votes.length') == 0
    begin('  Ada   Lovelace ')
    assert window.run('judge') == 'Ada Lovelace' and not window.errors
    assert window.run("fetch('data:text/plain,x').then(() => 'went', () => 'refused')") == 'refused'
    window.run("document.body.append(Object.assign(document.createElement('script'), "
               "{textContent: 'window.intruder = 1'}))")
    assert window.run('window.intruder') is None
    assert any('Content Security Policy' in str(error) for error in window.errors)
    window.errors.clear()

    # -- keys, mouse, and both questions of each comparison ---------------------------------------
    for name, known in key.comparisons.items():
        where = f'{ids.index(name) + 1} of 3'
        assert window.run("document.getElementById('where').textContent") == where
        assert window.run("document.getElementById('text').textContent") == known['caption']
        for side, file in zip(SIDES[known['left']], known['files']):
            np.testing.assert_array_equal(
                pixels(window.run(f"document.getElementById('{side}').src")),
                np.asarray(Image.open(file)))
        if name == ids[0]:
            assert not visible('[data-answer=neither]')
            press('ArrowDown')  # no answer to this question
            assert votes() == []
            time.sleep(WAIT)
            window.run("[0, 1].forEach(() => document.dispatchEvent(new KeyboardEvent('keydown', "
                       "{key: 'ArrowLeft'})))")  # the second one is too soon
            assert votes() == [(name, 'realism', 'left')]
            assert visible('[data-answer=neither]')
            press('ArrowDown')
        elif name == ids[1]:
            click('[data-answer=right]')
            click('[data-answer=neither]')
            # -- it all survives a reload, under this name alone ----------------------------------
            before = window.run('votes')
            begin('Grace')
            assert votes() == []
            begin('Ada Lovelace')
            assert window.run('votes') == before and len(before) == 4
            # -- and answers can be taken back ----------------------------------------------------
            press('Backspace')
            click('.back')
            assert votes() == [(ids[0], 'realism', 'left'), (ids[0], 'caption', 'neither')]
            press('ArrowLeft')
            assert window.run('votes[2].seconds') >= before[2]['seconds'] + WAIT
            press('ArrowRight')
        else:
            press('ArrowRight')
            press('ArrowRight')
    expected = list(zip(np.repeat(ids, 2).tolist(), ['realism', 'caption'] * 3,
                        ['left', 'neither', 'left', 'right', 'right', 'right']))
    assert votes() == expected and visible('#end') and not visible('#compare')

    # -- the file -----------------------------------------------------------------------------
    window.click('#end .download')
    file = tmp_path / 'votes-Ada-Lovelace.json'
    end = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    (found,) = read_votes([file], key)
    assert found.judge == 'Ada Lovelace'
    assert window.run("document.getElementById('copy').value") == file.read_text()
    outcomes = [{'neither': 'neither', **dict(zip(SIDES[key.comparisons[name]['left']],
                                                  ('first', 'second')))}[answer]
                for name, _, answer in expected]
    assert [outcome for outcome, _ in found.answers.values()] == outcomes
    assert all(WAIT <= seconds < 60 for _, seconds in found.answers.values())
    result = count([found], key)
    assert result['questions']['realism']['votes']['first'] == outcomes[::2].count('first')

    # -- a phone; another window; a browser that keeps nothing ------------------------------------
    begin('Phone')
    for width, height in ((320, 560), (1280, 620)):
        window.resize(width, height)
        assert window.run('document.documentElement.scrollWidth') <= width
        for selector in ('[data-answer=left]', '[data-answer=right]'):
            assert window.run(f"document.querySelector('{selector}').getBoundingClientRect()"
                              '.bottom') < height
    stored = "JSON.stringify({page, judge, votes: [{id: '0001', seconds: 1}]})"
    window.run(f'localStorage.setItem(place(judge), {stored}), window.dispatchEvent('
               'new StorageEvent("storage", {key: place(judge)}))')
    assert window.run('votes.length') == 1 and not visible('#alarm')
    stored = stored.replace('}]', "}, {id: '0001', seconds: 2}]")  # while this page slept
    window.run(f'localStorage.setItem(place(judge), {stored}), window.dispatchEvent('
               'new PageTransitionEvent("pageshow", {persisted: true}))')
    assert window.run('votes.length') == 2 and not visible('#alarm')
    window.run("Storage.prototype.setItem = () => { throw new Error('it is full'); }, 0")
    press('ArrowLeft')
    assert visible('#alarm') and 'it is full' in window.run(
        "document.getElementById('alarm').textContent")
    assert window.run('votes.length') == 3 and not window.errors
