"""TFDS directories: what is written reads back bit by bit, and other layouts are understood."""

import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data.__main__ import main
from dalle_jax.data.records import BadRecord
from dalle_jax.data.scenes import SceneConfig, Scenes
from dalle_jax.data.tfds import TfdsSource, build_scenes

tfds = pytest.importorskip('tensorflow_datasets')
features = tfds.features
CONFIG = SceneConfig(size=48, templates=3)


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def png(value, side=8):
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(file, 'PNG')
    return file.getvalue()


def prepare(directory, layout, examples):
    """A data set of the given features, prepared as users prepare theirs."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = 'photos'
        VERSION = tfds.core.Version('2.0.0')
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(layout))

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples(0), 'val': self._generate_examples(1)}

        def _generate_examples(self, skip):
            yield from list(enumerate(examples))[skip:]

    Builder(data_dir=directory, file_format='array_record').download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return directory / 'photos' / '2.0.0'


COCO = {
    'image': features.Image(encoding_format='png'), 'image/filename': features.Text(),
    'image/id': np.int64,
    'captions': features.Sequence({'id': np.int64, 'text': features.Text()})}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp('tfds')
    return build_scenes(directory, CONFIG, {'train': 300, 'combos': 7}, seed=2)


@pytest.mark.parametrize('split,length', [('train', 300), ('combos', 7)])
def test_scenes_read_back_identically_and_in_order(built, split, length):
    source, scenes = TfdsSource(built, split), Scenes(CONFIG, split, length, seed=2)
    assert len(source) == length
    for i in range(length):
        record, expected = source[i], scenes[i]
        np.testing.assert_array_equal(pixels(record.image), expected.image)
        assert record.captions == expected.captions
    assert len({source[i].name for i in range(length)}) == length


def test_slices_pickles_and_threads(built):
    source, part = TfdsSource(built, 'train'), TfdsSource(built, 'train[90%:]')
    assert len(part) == 30 and part[4].captions == source[274].captions
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(again.__getitem__, range(300)))
    assert read == [source[i] for i in range(300)]
    for index in (-1, 300):
        with pytest.raises(IndexError, match='train.*300'):
            source[index]


def test_scenes_are_not_overwritten(built):
    with pytest.raises(FileExistsError, match='scenes/1.0.0 exists'):
        build_scenes(built.parent.parent, CONFIG, {'train': 1})


def test_unusable_lengths_are_refused_before_writing(tmp_path):
    for lengths, message in (({}, 'no split'), ({'test': 3}, "'test'"), ({'train': 0}, 'length=0')):
        with pytest.raises(ValueError, match=message):
            build_scenes(tmp_path, CONFIG, lengths)
    assert not list(tmp_path.iterdir())


def test_coco_captions_layout(tmp_path):
    examples = [
        {'image': png(i), 'image/filename': f'{i}.png', 'image/id': i,
         'captions': [{'id': 10 * i + j, 'text': f' straße {i}, told {j}\n'} for j in range(i)]}
        for i in range(6)]
    prepared = prepare(tmp_path, COCO, examples)
    source, seen = TfdsSource(prepared, 'val'), set()  # all but the first example, shuffled
    for i in range(len(source)):
        record = source[i]
        value = int(pixels(record.image)[0, 0, 0])
        assert record.image == png(value)
        assert record.captions == tuple(f'straße {value}, told {j}' for j in range(value))
        seen.add(value)
    assert seen == {1, 2, 3, 4, 5}
    train = TfdsSource(prepared, 'train')
    with pytest.raises(BadRecord, match='photos/train/.*no captions'):  # the first has none
        [train[i] for i in range(6)]


@pytest.mark.parametrize('layout,value,expected', [
    ({'caption': features.Text()}, {'caption': 'a'}, ('a',)),
    ({'story': features.Text()}, {'story': 'a'}, ('a',)),
    ({'texts': features.Sequence(features.Text())}, {'texts': ['a', '', 'b']}, ('a', 'b')),
    ({'url': features.Text(), 'text': features.Text()}, {'url': 'u', 'text': 'a'}, ('a',)),
    ({'notes': features.Sequence({'said': features.Text(), 'n': np.int64})},
     {'notes': [{'said': 'a', 'n': 1}, {'said': 'b', 'n': 2}]}, ('a', 'b')),
])
def test_other_layouts(tmp_path, layout, value, expected):
    layout = {'picture': features.Image(encoding_format='png'), **layout}
    prepared = prepare(tmp_path, layout, [{'picture': png(i), **value} for i in range(2)])
    record = TfdsSource(prepared, 'train')[0]
    assert record.captions == expected and pixels(record.image).shape == (8, 8, 3)


@pytest.mark.parametrize('layout,value,message', [
    ({'label': np.int64}, {'label': 1}, 'label: .*which are the captions'),
    ({'url': features.Text(), 'author': features.Text()}, {'url': 'u', 'author': 'a'},
     'author: Text.*which are the captions.*caption'),
    ({'text': features.Text(), 'mask': features.Image(encoding_format='png')},
     {'text': 'a', 'mask': png(0)}, 'mask: Image.*which is the image'),
])
def test_ambiguous_features_are_listed(tmp_path, layout, value, message):
    layout = {'picture': features.Image(encoding_format='png'), **layout}
    prepared = prepare(tmp_path, layout, [{'picture': png(i), **value} for i in range(2)])
    with pytest.raises(ValueError, match=message):
        TfdsSource(prepared, 'train')


def test_wrong_directories_and_splits_name_the_choices(built, tmp_path):
    with pytest.raises(FileNotFoundError, match='not there; give the version directory'):
        TfdsSource(tmp_path / 'none', 'train')
    with pytest.raises(FileNotFoundError, match='no dataset_info.json'):
        TfdsSource(tmp_path, 'train')
    for parent in (built.parent, built.parent.parent):
        with pytest.raises(FileNotFoundError, match=f'but contains: {built}'):
            TfdsSource(parent, 'train')
    with pytest.raises(ValueError, match="no split 'valid'; there are train, combos, and slices"):
        TfdsSource(built, 'valid')


def test_damaged_directories(tmp_path):
    prepared = build_scenes(tmp_path, CONFIG, {'train': 40})
    data, = prepared.glob('*.array_record*')
    whole = data.read_bytes()
    at = len(whole.rstrip(b'\0')) // 4  # compressed records, not the index that follows
    data.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    source = TfdsSource(prepared, 'train')
    bad = 0
    for i in range(40):
        try:
            source[i]
        except BadRecord as error:
            bad += 1
            assert f'train/{i}:' in str(error)
    assert bad >= 1

    info = prepared / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    data.rename(str(data).replace('array_record', 'tfrecord'))
    with pytest.raises(ValueError, match='prepared as tfrecord.*array_record'):
        TfdsSource(prepared, 'train')
    for file in prepared.glob('*.tfrecord*'):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="1 data files of split 'train' are missing"):
        TfdsSource(prepared, 'train')


def test_command_writes_data_and_sheet_without_tensorflow(tmp_path):
    code = ('import sys\nfrom dalle_jax.data.__main__ import main\nmain(sys.argv[1:])\n'
            'from dalle_jax.data.tfds import TfdsSource\n'
            'TfdsSource(sys.argv[3] + "/scenes/1.0.0", "pairs")[4]\n'
            'assert not {"tensorflow", "jax"} & set(sys.modules)')
    sheet = tmp_path / 'sheet.png'
    done = subprocess.run(
        [sys.executable, '-c', code, 'scenes', '--out', str(tmp_path), '--sheet', str(sheet),
         '--train', '20', '--combos', '0', '--pairs', '5', '--colours', '4', '--seed', '9'],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'{tmp_path}/scenes/1.0.0: ' in done.stdout
    assert 'train 20 records, pairs 5 records' in done.stdout
    expected = Scenes(SceneConfig(colours=4), 'train', 20, seed=9)[19]
    record = TfdsSource(tmp_path / 'scenes' / '1.0.0', 'train')[19]
    np.testing.assert_array_equal(pixels(record.image), expected.image)
    assert record.captions == expected.captions
    assert np.unique(pixels(sheet.read_bytes()).reshape(-1, 3), axis=0).shape[0] > 50


def test_command_reports_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit, match='colours=9'):
        main(['scenes', '--sheet', str(tmp_path / 'x.png'), '--colours', '9'])
    with pytest.raises(SystemExit):
        main(['scenes'])
    assert 'give --out DIR' in capsys.readouterr().err
