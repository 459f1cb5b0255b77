"""The sample verb: what it reads, what it writes, and that stopping it anywhere changes nothing."""

import io
import json
import shutil

import numpy as np
import pytest
from absl import app
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_jax import generate, runs, sample
from dalle_jax.data.records import BadRecord
from dalle_jax.generate import Sampling
from tests.test_generate import tiny_model

CAPTIONS = ['a red circle', 'a ring', 'a red circle', 'a <b>green</b> ring', 'two small squares']
SAMPLING = Sampling(3, seed=4, batch=6)  # two captions at once


@pytest.fixture(scope='module')
def model():
    return tiny_model()


@pytest.fixture(scope='module')
def whole(model, tmp_path_factory):
    """A directory written without interruption, two of three candidates kept."""
    out = tmp_path_factory.mktemp('samples') / 'out'
    notes = [{'category': f'kind {i}'} for i in range(len(CAPTIONS))]
    sample.run(model, CAPTIONS, SAMPLING, 2, out, notes)
    return out


def again(model, out, captions=CAPTIONS, sampling=SAMPLING, keep=2, prompt=None):
    notes = [{'category': f'kind {i}'} for i in range(len(captions))]
    sample.run(model, captions, sampling, keep, out, notes, prompt)


def read(out):
    return [json.loads(line) for line in (out / 'samples.jsonl').read_text().splitlines()]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_line_and_a_file_for_each_kept_image(model, whole):
    lines = read(whole)
    assert [(line['caption'], line['category'], line['rank']) for line in lines] == [
        (caption, f'kind {i}', rank) for i, caption in enumerate(CAPTIONS) for rank in range(2)]
    drawn = model.sample(CAPTIONS, 3, seed=4, batch=6)
    for number, one in enumerate(drawn):
        best = sorted(range(3), key=lambda i: -one.scores[i])[:2]
        for rank, i in enumerate(best):
            line = lines[2 * number + rank]
            np.testing.assert_array_equal(np.asarray(Image.open(whole / line['file'])),
                                          one.images[i])
            assert line['index'] == i and line['batch'] == [2, 3] and not line['truncated']
            assert line['logp_text'] == one.logp_text and line['logp_image'] == one.logp[i]
            assert line['clip_score'] == one.scores[i] and line['image_prompt'] is None
            assert set(line) == {'caption', 'category', *sample.FIELDS}
    assert len({line['file'] for line in lines}) == 10  # also of the caption that is there twice
    assert lines[0]['logp_image'] == lines[4]['logp_image']
    assert Image.open(whole / 'grid.png').size == (2 * 18 + 2, 5 * 18 + 2)
    page = (whole / 'report.html').read_text()
    assert 'a &lt;b&gt;green&lt;/b&gt; ring' in page and page.count('<img') == 10


@settings(max_examples=12, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_stopped_anywhere_and_started_again_gives_the_same_files(model, whole, tmp_path, data):
    out, expected = tmp_path / 'out', contents(whole)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out)
    text = expected['samples.jsonl']
    cut = data.draw(st.integers(0, len(text)))
    (out / 'samples.jsonl').write_bytes(text[:cut])
    finished = text[:cut].count(b'\n') // 2
    later = sorted(name for name in expected if name.endswith('.png') and name[:5].isdigit()
                   and int(name[:5]) >= finished)
    for name in data.draw(st.sets(st.sampled_from(later))) if later else ():
        (out / name).write_bytes(expected[name][:20])  # torn, or of another time
    (out / 'grid.png').unlink()
    (out / 'report.html').unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob('0*.png')
            if int(path.name[:5]) < finished}
    again(model, out)
    assert contents(out) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_an_image_that_was_removed_is_drawn_again(model, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / 'out')
    (out / '00003-001.png').unlink()
    again(model, out)
    assert contents(out) == contents(whole)


def test_finished_captions_survive_an_error(model, whole, tmp_path, monkeypatch):
    """Ctrl-C in the middle; and what is asked for next is only what is missing."""
    drawing, asked = generate.Model.draw, []

    def stops(self, captions, sampling, *where, start, progress):
        asked.append(start)
        for number, drawn in enumerate(drawing(self, captions, sampling, start=start), start):
            if number == 3:
                raise KeyboardInterrupt
            yield drawn

    monkeypatch.setattr(generate.Model, 'draw', stops)
    with pytest.raises(KeyboardInterrupt):
        again(model, tmp_path / 'out')
    monkeypatch.undo()
    assert [line['category'] for line in read(tmp_path / 'out')] == [
        f'kind {i}' for i in range(3) for _ in range(2)]
    again(model, tmp_path / 'out')
    assert contents(tmp_path / 'out') == contents(whole) and asked == [0]


def test_other_settings_in_the_same_directory_are_refused_by_name(model, whole):
    def refused(match, **changes):
        with pytest.raises(runs.RunError, match=match):
            again(changes.pop('model', model), whole, **changes)

    before = contents(whole)
    refused('temperature was 1.0 and is now 0.5',
            sampling=Sampling(3, seed=4, batch=6, temperature=0.5))
    refused('seed was 4 and is now 5', sampling=Sampling(3, seed=5, batch=6))
    refused('batch was 6 and is now 8', sampling=Sampling(3, seed=4, batch=8))
    refused('keep was 2 and is now 3', keep=3)
    refused('captions was 5 and is now 4', captions=CAPTIONS[:4])
    refused('hash of captions was', captions=[*CAPTIONS[:4], 'another'])
    refused('rows was 0 and is now 1',
            prompt=sample.Prompt('a.png', np.zeros((16, 16, 3), np.uint8), 1, 0))
    refused('weights of the clip was .* and is now None', model=tiny_model(with_clip=False))
    assert contents(whole) == before


def test_the_batch_that_was_chosen_stays_when_less_memory_is_free(model, tmp_path, monkeypatch):
    monkeypatch.setattr(generate.machine, 'memory', lambda: 2**34)
    again(model, tmp_path / 'out', CAPTIONS[:2], Sampling(3, seed=4))
    before = contents(tmp_path / 'out')
    (tmp_path / 'out' / 'samples.jsonl').write_text('')
    monkeypatch.setattr(generate.machine, 'memory', lambda: 2**20)
    again(model, tmp_path / 'out', CAPTIONS[:2], Sampling(3, seed=4))
    assert contents(tmp_path / 'out') == before


def test_strangers_and_two_at_once_are_refused(model, tmp_path):
    (tmp_path / 'samples.jsonl').write_text('')
    with pytest.raises(runs.RunError, match='holds samples.jsonl without settings.json'):
        again(model, tmp_path)
    with runs.take(tmp_path / 'other', '--out'):
        with pytest.raises(runs.RunError, match='other is in use by another process'):
            again(model, tmp_path / 'other')
    with pytest.raises(ValueError, match='keep is 4; give 1 to 3, the candidates drawn'):
        again(model, tmp_path / 'third', keep=4)
    with pytest.raises(ValueError, match='top_k is 99'):
        again(model, tmp_path / 'third', sampling=Sampling(3, top_k=99))
    assert not (tmp_path / 'third').exists()


def test_the_overviews_are_limited_and_say_so(model, whole, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(whole, tmp_path / 'out')
    monkeypatch.setattr(sample, 'GRID', (3, 1))  # a caption takes two rows
    monkeypatch.setattr(sample, 'REPORT_IMAGES', 5)
    again(model, out)
    assert 'wrote 10 images' in (printed := capsys.readouterr().out)
    assert 'grid.png shows 3 of them and report.html 4' in printed
    assert Image.open(out / 'grid.png').size == (18 + 2, 3 * 18 + 2)
    assert '2 of 5 captions' in (out / 'report.html').read_text()


def test_image_prompts_from_a_file(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    file = tmp_path / 'prompt.png'
    Image.fromarray(pixels).save(file)
    prompt = sample.read_prompt(str(file), 16, 1, 3)
    np.testing.assert_array_equal(prompt.image, pixels[:, 4:20])  # the middle
    again(model, tmp_path / 'out', CAPTIONS[:2], Sampling(4), prompt=prompt)
    for line in read(tmp_path / 'out'):
        assert line['image_prompt'] == str(file) and (line['rows'], line['columns']) == (1, 3)
    with pytest.raises(BadRecord, match='prompt.png: 24 x 16 pixels, .* at least 17'):
        sample.read_prompt(str(file), 17, 2, 1)
    (tmp_path / 'broken.png').write_bytes(file.read_bytes()[:60])
    with pytest.raises(BadRecord, match='broken.png'):
        sample.read_prompt(str(tmp_path / 'broken.png'), 16, 2, 1)


PARTI = ('Prompt\tCategory\tChallenge\tNote\n'
         'a "quoted" word\tArtifacts\tWriting & Symbols\t\n'
         'a sloth\x85with a bowtie\tAnimals\n')


def test_captions_from_arguments_files_tables_and_standard_input(tmp_path, monkeypatch):
    assert sample.read_captions(['four', ' five '], None) == (['four', 'five'], [{}, {}])
    file = tmp_path / 'captions.txt'
    file.write_bytes('\ufeffone\r\n two\t2 \r\nPrompt\r\n\r\n'.encode())
    assert sample.read_captions([], str(file))[0] == ['one', 'two\t2', 'Prompt']
    table = [{'category': 'Artifacts', 'challenge': 'Writing & Symbols', 'note': ''},
             {'category': 'Animals', 'challenge': '', 'note': ''}]
    expected = ['a "quoted" word', 'a sloth\x85with a bowtie'], table
    (tmp_path / 'parti.tsv').write_text(PARTI)
    assert sample.read_captions([], str(tmp_path / 'parti.tsv')) == expected
    monkeypatch.setattr('sys.stdin', io.StringIO(PARTI))
    assert sample.read_captions([], '-') == expected
    (tmp_path / 'one.tsv').write_text('Prompt\na ring\n')
    assert sample.read_captions([], str(tmp_path / 'one.tsv')) == (['a ring'], [{}])


@pytest.mark.parametrize('name,text,match', [
    ('a.txt', 'one\n\ntwo\n', 'a.txt: line 2 is empty'),
    ('a.txt', '\n \n', 'no captions'),
    ('a.tsv', PARTI + '\tAnimals\n', 'a.tsv: line 4 is empty'),
    ('a.tsv', PARTI + 'b\t\t\t\tc\n', 'a.tsv: line 4 has 5 cells, and the header has 4'),
    ('a.tsv', 'Caption\tid\nb\t1\n', 'a.tsv has the columns Caption, id, and none is called'),
    ('a.tsv', 'Prompt\tRank\nb\t1\n', "a.tsv has a column 'rank', which another"),
    ('a.tsv', 'Prompt\tNote\tnote\nb\t1\t2\n', "a.tsv has a column 'note', which another"),
    ('a.tsv', 'Prompt\tCategory\n', 'no captions'),
    ('-', 'one\n\ntwo\n', 'standard input: line 2 is empty'),
    ('a.txt', b'caf\xe9\n', 'a.txt is no UTF-8 text')])
def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch, name, text, match):
    if name == '-':
        monkeypatch.setattr('sys.stdin', io.StringIO(text))
    else:
        text = text if isinstance(text, bytes) else text.encode()
        name = str(tmp_path / name)
        (tmp_path / name).write_bytes(text)
    with pytest.raises(app.UsageError, match=match):
        sample.read_captions([], name)


def test_arguments_that_say_too_little_or_too_much():
    for arguments, file, match in ((['five', ' '], None, 'caption 2 is empty'),
                                   ([], None, 'no captions: give them as arguments'),
                                   (['a'], 'b.txt', 'captions as arguments and in b.txt')):
        with pytest.raises(app.UsageError, match=match):
            sample.read_captions(arguments, file)
