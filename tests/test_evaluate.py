"""Evaluation of a tiny model: against numbers made by hand, stopped, and done again."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax import config as config_lib
from dalle_jax import evaluate, runs
from dalle_jax.evaluation import candidates
from dalle_jax.evaluation import data as data_lib
from dalle_jax.evaluation.config import EvaluateConfig
from dalle_jax.metrics import fid, quality
from dalle_jax.metrics.blur import blur
from tests.test_generate import tiny_model

SIDE, COUNT = 16, 30
MIX = np.random.default_rng(0).normal(size=(3 * SIDE * SIDE, 5))


def look(images):
    flat = images.reshape(len(images), -1) / 255 @ MIX
    return flat.astype(np.float32), (flat[:, :4] * 3).astype(np.float32)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """A folder of captioned images that are not square, and two files that cannot be used."""
    path, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(1)
    for i in range(COUNT + 2):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path / f'{i:02}.png')
        (path / f'{i:02}.txt').write_text(f'a red circle number {i}\na ring {i}')
    (path / '03.png').write_bytes(b'nothing')
    (path / '04.txt').write_text('')
    return path


@pytest.fixture(scope='module')
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def tiny(monkeypatch, model):
    monkeypatch.setattr(evaluate, 'Model', lambda path, clip=None, mesh='': model)
    monkeypatch.setattr(data_lib, 'open_network',
                        lambda path, *_: path and data_lib.Network('inception', look, 5, 0, 8, 'aa'))


def options(photos, **changes):
    return {'run': 'dalle', 'clip': 'clip', 'source': 'folder', 'path': str(photos),
            'splits': ['all'], 'crop': 'center', 'captions': 20, 'candidates': 4, 'rerank': [1, 2],
            'blur': [0, 1], 'features': 'weights.pth', 'score_splits': 2, 'kid_subsets': 3} | changes


@pytest.fixture(scope='module')
def whole(photos, model, tmp_path_factory):
    out = tmp_path_factory.mktemp('evaluation') / 'out'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, 'Model', lambda path, clip=None, mesh='': model)
        patch.setattr(data_lib, 'open_network',
                      lambda path, *_: path and data_lib.Network('inception', look, 5, 0, 8, 'aa'))
        return out, evaluate.run(options(photos), out)


def test_numbers_are_those_made_by_hand(whole, photos, model):
    out, result = whole
    found = result['results']['all']
    pairs = json.loads((out / 'captions_all.json').read_text())['pairs']
    real = []
    for name in pairs['ids']:
        with Image.open(photos / name.partition('#')[0]) as image:
            image = image.resize((19, SIDE), Image.Resampling.LANCZOS)
            real.append(np.asarray(image.crop((1, 0, 17, SIDE))))
    drawn = model.sample(pairs['captions'], 4, batch=result['settings']['batch'])
    best = {n: np.stack([d.images[np.argmax(d.scores[:n])] for d in drawn]) for n in (1, 2, 4)}
    for n, radius in ((1, 0), (2, 0), (4, 0), (4, 1)):
        sides = [look(blur(np.asarray(side), radius)) for side in (best[n], real)]
        want = fid.frechet_distance(*(fid.gaussian(fid.moments(f)) for f, _ in sides))
        entry = found['quality'][f'best_of_{n}_blur_{radius}']
        assert entry['fid'] == pytest.approx(want, rel=1e-6) and entry['images'] == 20
        assert entry['inception_score'] == pytest.approx(
            fid.inception_score(sides[0][1], 2, seed=2020)[0], rel=1e-5)
    assert found['quality']['best_of_4_blur_0']['kid'] == pytest.approx(fid.kernel_distance(
        look(best[4])[0], look(np.asarray(real))[0], 1, 20)[0], rel=1e-4)
    assert found['clip_score'] == pytest.approx(
        100 * np.mean([d.scores.max() for d in drawn]), rel=1e-5)
    nats = -np.asarray(model.run.module.likelihood(
        model.run.params, model.run.config, model._ids(model.run, pairs['captions'])[0],
        model.encode(np.asarray(real))))
    tokens = np.array([model.run.config.text_length - 1, model.run.config.image_length])
    assert (found['text_nats_per_token'], found['image_nats_per_token']) == pytest.approx(
        tuple(nats.mean(axis=1) / tokens), rel=1e-5)


def test_the_result_tells_what_it_was_made_with(whole, photos):
    out, result = whole
    assert json.loads((out / 'result.json').read_text()) == json.loads(json.dumps(result))
    told = result['captions']['all']
    assert told['excluded'] == 0
    rows, width = told['drawn_at_once']
    assert width == 4 and rows * width <= result['settings']['batch']
    assert told['captions'] == 20 and told['left_out'] <= 2
    assert json.loads((out / 'captions_all.json').read_text())['hash'] == told['hash']
    assert result['settings']['batch'] > 0 and result['weights']['inception'] == 'aa'
    assert {'dalle', 'dvae', 'clip'} <= set(result['weights']) and 'jax' in result['software']
    page = (out / 'report.html').read_text()
    assert 'FID' in page and told['hash'] in page


def test_stopped_anywhere_it_goes_on(whole, photos, tmp_path, monkeypatch, capsys):
    """After some captions and after some measurements; nothing is drawn or measured twice."""
    monkeypatch.setattr(candidates, 'IMAGES', 16)  # of four captions

    def stop_in(module, name, calls):
        function, left = getattr(module, name), [calls]

        def stopping(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        monkeypatch.setattr(module, name, stopping)

    for module, name, calls in ((candidates, '_write', 2), (quality, 'measure', 3)):
        with monkeypatch.context():
            old = getattr(module, name)
            stop_in(module, name, calls)
            with pytest.raises(KeyboardInterrupt):
                evaluate.run(options(photos), tmp_path)
            setattr(module, name, old)
    capsys.readouterr()
    result = evaluate.run(options(photos), tmp_path)
    printed = capsys.readouterr().out
    assert result['results'] == whole[1]['results']
    assert 'images drawn' not in printed and printed.count('measured at blur') == 4 - 3


def test_again_with_the_same_numbers(whole, tmp_path, monkeypatch, capsys):
    out, result = whole
    assert evaluate.reproduce(out / 'result.json', tmp_path / 'again') == []
    other = json.loads((out / 'result.json').read_text())
    other['results']['all']['clip_score'] += 1e-13
    other['software']['jax'] = '0.0.1'
    (tmp_path / 'other.json').write_text(json.dumps(other))
    capsys.readouterr()
    difference, = evaluate.reproduce(tmp_path / 'other.json', tmp_path / 'again')
    assert difference.startswith('all.clip_score: ')
    assert 'NOT the same: software' in capsys.readouterr().out
    for text in ('{}', '[1]', '{'):
        (tmp_path / 'no.json').write_text(text)
        with pytest.raises(ValueError, match='is no result of evaluate'):
            evaluate.reproduce(tmp_path / 'no.json', tmp_path / 'x')
    with pytest.raises(ValueError, match='holds the numbers that are to be reproduced'):
        evaluate.reproduce(out / 'result.json', out)


def test_other_settings_need_another_directory(whole, photos):
    with pytest.raises(runs.RunError, match='captions was 20 and is now 10'):
        evaluate.run(options(photos, captions=10), whole[0])


def test_other_software_is_told(photos, tmp_path, capsys):
    settings = options(photos, run='', clip='', images=str(tmp_path / 'images.npz'), rerank=[])
    np.savez(tmp_path / 'images.npz', **squares(25))
    first = evaluate.run(settings, tmp_path / 'out')
    begun = json.loads((tmp_path / 'out' / 'evaluate.json').read_text())
    begun['sessions'][0]['software']['jax'] = '0.0.1'
    (tmp_path / 'out' / 'evaluate.json').write_text(json.dumps(begun))
    capsys.readouterr()
    again = evaluate.run(settings, tmp_path / 'out')
    old, new = again.pop('sessions')
    assert old['software'] == first['software'] | {'jax': '0.0.1'}
    assert new == {key: first[key] for key in ('software', 'device')}
    assert again == first and 'a part of its numbers comes from there' in capsys.readouterr().out
    assert 'all sessions' in (tmp_path / 'out' / 'report.html').read_text()
    again = evaluate.run(settings, tmp_path / 'out')  # what was once mixed stays mixed
    assert again['sessions'] == [old, new]


def test_a_directory_of_something_else(photos, tmp_path):
    (tmp_path / 'measured').mkdir()
    with pytest.raises(runs.RunError, match=r'not empty \(it holds measured\) and has no evaluate'):
        evaluate.run(options(photos), tmp_path)


def test_data_that_have_changed(whole, photos, tmp_path, monkeypatch):
    """An image more, which comes first: the records that were chosen are others now."""
    folder = tmp_path / 'photos'
    shutil.copytree(photos, folder)
    monkeypatch.setattr(quality, 'measure', None)
    with pytest.raises(TypeError):
        evaluate.run(options(folder), tmp_path / 'out')
    shutil.copy(folder / '05.png', folder / '000.png')
    (folder / '000.txt').write_text('a red ring')
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, 'Model', lambda path, clip=None, mesh='': tiny_model())
    monkeypatch.setattr(data_lib, 'open_network',
                        lambda path, *_: data_lib.Network('inception', look, 5, 0, 8, 'aa'))
    with pytest.raises(ValueError, match='the data have changed since captions were chosen'):
        evaluate.run(options(folder), tmp_path / 'out')


def test_names_that_are_excluded(photos, tmp_path, capsys):
    (tmp_path / 'trained_on').write_text('00.png\n01.png\nelsewhere.png\n')
    np.savez(tmp_path / 'images.npz', **squares(25))
    result = evaluate.run(given(photos, tmp_path / 'images.npz', captions=0,
                                exclude=str(tmp_path / 'trained_on')), tmp_path / 'out')
    told = result['captions']['all']
    assert (told['captions'], told['excluded'], told['left_out']) == (2 * (COUNT - 2), 2, 1)
    assert '2 records have names that' in capsys.readouterr().out


# -- images that are given -------------------------------------------------------------------------


def squares(count, captions=True, side=SIDE, seed=2):
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
    return {'images': images} | ({'captions': np.array([f'a ring {i}' for i in range(count)])}
                                 if captions else {})


def given(photos, path, **changes):
    return options(photos, **{'run': '', 'clip': '', 'judge': 'clip', 'images': str(path),
                              'rerank': []} | changes)


def test_a_folder_is_judged_like_its_arrays(photos, tmp_path):
    arrays = squares(25)
    np.savez(tmp_path / 'images.npz', **arrays)
    (tmp_path / 'folder').mkdir()
    for i, (image, caption) in enumerate(zip(*arrays.values())):
        Image.fromarray(image).save(tmp_path / 'folder' / f'{i:03}.png')
        (tmp_path / 'folder' / f'{i:03}.txt').write_text(caption)
    found = [evaluate.run(given(photos, tmp_path / name), tmp_path / f'out_{name}')
             for name in ('images.npz', 'folder')]
    assert found[0]['results'] == found[1]['results']
    assert found[0]['inputs'] == found[1]['inputs'] != {}
    np.savez(tmp_path / 'images.npz', **arrays | {'images': arrays['images'][::-1]})
    with pytest.raises(runs.RunError, match='holds an evaluation with other .*: hash of images'):
        evaluate.run(given(photos, tmp_path / 'images.npz'), tmp_path / 'out_images.npz')
    quality = found[0]['results']['all']['quality']
    assert quality['best_of_1_blur_0']['images'] == 25 and 'best_of_1_blur_1' in quality
    assert found[0]['results']['all']['clip_score'] == pytest.approx(100 * tiny_model().score(
        arrays['captions'].tolist(), arrays['images']).mean(), rel=1e-5)


def test_statistics_files_are_a_reference(photos, tmp_path):
    np.savez(tmp_path / 'images.npz', **squares(25))
    features = look(squares(40, seed=3)['images'])[0]
    fid.write_gaussian(tmp_path / 'real.npz', fid.gaussian(fid.moments(features)))
    found = evaluate.run(given(photos, tmp_path / 'images.npz',
                               reference=str(tmp_path / 'real.npz')), tmp_path / 'out')
    want = fid.frechet_distance(fid.gaussian(fid.moments(look(squares(25)['images'])[0])),
                                fid.read_gaussian(tmp_path / 'real.npz'))
    assert {k: v['fid'] for k, v in found['results']['all']['quality'].items()} == {
        'best_of_1_blur_0': pytest.approx(want, rel=1e-6)}
    alone = evaluate.run(given('', tmp_path / 'images.npz', source='', judge='',
                               reference=str(tmp_path / 'real.npz')), tmp_path / 'alone')
    assert alone['captions'] == {} and set(alone['inputs']) == {'images', 'reference'}
    assert alone['inputs'].items() < found['inputs'].items()
    assert alone['results']['all']['quality'] == found['results']['all']['quality']
    assert 'Beside the statistics in' in (tmp_path / 'alone' / 'report.html').read_text()


def test_images_that_cannot_be_judged(photos, tmp_path):
    def refuse(match, path, **changes):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            evaluate.run(given(photos, path, **changes), tmp_path / 'out')
        assert not (tmp_path / 'out').exists()

    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file, side in files:
            Image.new('RGB', side).save(tmp_path / name / file)
        return tmp_path / name

    refuse('no directory', tmp_path / 'nowhere')
    refuse('0 images', folder('empty'))
    refuse('squares of one size.*a.png: 16 x 16, b.png: 8 x 8',
           folder('sizes', ('a.png', (16, 16)), ('b.png', (8, 8))))
    refuse('squares of one size.*a.png: 16 x 8', folder('wide', ('a.png', (16, 8))))
    refuse('1 names belong to several images, the first is a',
           folder('twins', ('a.png', (16, 16)), ('a.jpg', (16, 16))))
    broken = folder('broken', ('a.png', (16, 16)))
    (broken / 'b.png').write_bytes(b'nothing')
    refuse('1 of 2 images cannot be read: b.png', broken)
    (tmp_path / 'cut.npz').write_bytes(b'PK')
    refuse('no .npz file, or it is cut short', tmp_path / 'cut.npz')
    np.savez(tmp_path / 'other.npz', x=np.zeros(3))
    refuse('no array `images`; it has x', tmp_path / 'other.npz')
    np.savez(tmp_path / 'floats.npz', images=np.zeros((3, 8, 8, 3)))
    refuse(r'images are float64 \[3, 8, 8, 3\]', tmp_path / 'floats.npz')
    np.savez(tmp_path / 'objects.npz', **squares(3) | {'captions': np.array(['a'] * 3, object)})
    refuse('objects.npz cannot be read .*captions as an array of strings', tmp_path / 'objects.npz')
    np.savez(tmp_path / 'less.npz', **squares(3) | {'captions': np.array(['a'])})
    refuse('1 captions and 3 images', tmp_path / 'less.npz')


def test_too_few_images_are_told_before_the_work(photos, tmp_path, monkeypatch):
    np.savez(tmp_path / 'few.npz', **squares(4))
    monkeypatch.setattr(quality, 'measure', None)
    monkeypatch.setattr(candidates, 'draw', None)

    def refuse(match, settings):
        with pytest.raises((ValueError, FileNotFoundError, runs.RunError), match=match):
            evaluate.run(settings, tmp_path / 'out')
        # The directory is still free for other settings.
        assert not {*(tmp_path / 'out').glob('*')} - {tmp_path / 'out' / 'lock'}

    refuse('5 features .*at least 6 images, and there are 4', given(photos, tmp_path / 'few.npz'))
    refuse('blur radius 5 with images of 16 pixels', options(photos, blur=[5]))
    refuse('21 parts needs as many images, and there are 20', options(photos, score_splits=21))
    refuse('exclude: nowhere: no such file', options(photos, exclude='nowhere'))
    refuse("nowhere: there is no statistics file", options(photos, reference='nowhere'))
    fid.write_gaussian(tmp_path / 'other.npz', fid.Gaussian(np.zeros(7), np.eye(7)))
    refuse('other.npz has statistics of 7 features, and inception has 5',
           options(photos, reference=str(tmp_path / 'other.npz')))
    monkeypatch.setattr(data_lib, 'open_network',
                        lambda path, *_: data_lib.Network('words', look, 5, 60, 8, 'aa'))
    refuse('images have 16 pixels a side, and words takes 60', options(photos, features='words'))
    monkeypatch.setattr(data_lib, 'open_network',
                        lambda path, *_: data_lib.Network('inception', look, 5, 0, 8, 'aa'))
    spaces = squares(25)
    spaces['captions'][21] = ' '
    np.savez(tmp_path / 'spaces.npz', **spaces)
    refuse('spaces.npz: caption 21', given(photos, tmp_path / 'spaces.npz'))
    np.savez(tmp_path / 'blurred.npz', mu=np.zeros(5), sigma=np.eye(5), about=json.dumps(
        {'network': 'inception', 'fingerprint': 'aa', 'resize': 'tensorflow', 'blur': 2}))
    refuse('blurred.npz has statistics of something else: blur 2 in place of 0',
           options(photos, reference=str(tmp_path / 'blurred.npz')))
    np.savez(tmp_path / 'mute.npz', **squares(25, captions=False))
    refuse('mute.npz has no captions, so there is no CLIP score',
           given(photos, tmp_path / 'mute.npz'))


@pytest.mark.parametrize('changes,message', [
    ({'run': ''}, 'run is'), ({'images': 'x'}, 'run is'),
    ({'run': '', 'images': 'x'}, "clip is 'clip'; it must be '' where images are given"), ({'source': 'tokens'}, 'source is'),
    ({'path': ''}, 'path is'),
    ({'source': ''}, "source is ''; it must be scenes, folder or tfds, unless images are given"), ({'crop': 'stage1'}, 'crop is'), ({'captions': -1}, 'captions is'),
    ({'rerank': [5]}, r'rerank is \(5,\); it must be numbers from 1 to candidates, which is 4'),
    ({'blur': [-1]}, 'blur is'), ({'paper': 'imagenet'}, 'paper is'), ({'splits': []}, 'splits')])
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        config_lib.build(EvaluateConfig, options('photos', **changes), '')


@pytest.mark.parametrize('name', ['eval_coco.py', 'eval_cub.py', 'evaluate.py:scenes'])
def test_experiments(name):
    values = config_lib.load(f'experiments/{name}').to_dict()
    assert set(values) == {field.name for field in dataclasses.fields(EvaluateConfig)}
    given = {'run': 'r'} if 'scenes' in name else {'run': 'r', 'path': 'p'}
    conditions = config_lib.build(EvaluateConfig, values | given, '').conditions
    if 'scenes' in name:
        assert conditions == {1: [0], 2: [0], 4: [0], 8: [0, 1, 2]}
    else:
        assert conditions == {2**i: [0] for i in range(9)} | {512: [0, 1, 2, 4, 8]}
    assert jax.tree.all(jax.tree.map(lambda a: a is not None, values))
