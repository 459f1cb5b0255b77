"""Folders of images with every kind of mess in them, and the experiment's data section."""

import dataclasses
import io
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import images, sources
from dalle_jax.data.records import BadRecord, Record
from dalle_jax.data.sources import DataConfig, FolderSource, open_source


def picture(seed=0, kind='PNG'):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(root, **files):
    """Writes files given as path=content, with '__' for '/' and the last '_' for '.'."""
    for name, content in files.items():
        path = root / '.'.join(name.replace('__', '/').rsplit('_', 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def messy(tmp_path):
    write(tmp_path, a_png=picture(1), a_txt='a red circle\n\n  a circle, red  \r\n \n',
          b_JPG=picture(2, 'JPEG'), b_TXT='\ufeffein Fuß', sub__deep__c_webp=picture(3, 'WEBP'),
          sub__deep__c_txt='see', sub__d_JPeG=picture(4, 'JPEG'), e_png=picture(5), e_txt='\n \n',
          f_png=b'no image', f_txt='broken', g_png=picture(6), g_txt=b'caf\xe9',
          h_txt='without an image', i_png=picture(7), i_jpg=picture(8, 'JPEG'), i_txt='twins',
          notes_md='ignored')
    write(tmp_path / '.cache', x_png=picture(9), x_txt='hidden')
    (tmp_path / '.hidden.png').write_bytes(picture(10))
    (tmp_path / '._a.png').write_bytes(b'resource fork')
    return tmp_path


def test_folder_lists_images_in_order(messy):
    source = FolderSource(messy)
    assert source.images == ['a.png', 'b.JPG', 'e.png', 'f.png', 'g.png', 'i.jpg', 'i.png',
                             'sub/d.JPeG', 'sub/deep/c.webp']
    assert len(source) == 9


def test_folder_summary_counts(messy):
    assert FolderSource(messy).summary() == (
        f'{messy}: 9 images, 9 in split all, 1 without a caption file, 1 caption files without an '
        'image, 1 images that share their name with another')


def test_folder_records(messy):
    source = FolderSource(messy)
    record = source[0]
    assert record == Record(picture(1), ('a red circle', 'a circle, red'), 'a.png')
    assert images.decode(record.image, record.name).shape == (8, 8, 3)
    assert source[1].captions == ('ein Fuß',)
    assert source[5].captions == source[6].captions == ('twins',)
    assert source[8] == Record(picture(3, 'WEBP'), ('see',), 'sub/deep/c.webp')
    assert pickle.loads(pickle.dumps(source))[0] == record


def test_folder_bad_records_name_the_file_and_the_reason(messy):
    source = FolderSource(messy)
    for index, reason in [(2, '^e.png: no captions; write them to e.txt'),
                          (4, '^g.png: g.txt is not UTF-8 at byte 3'),
                          (7, '^sub/d.JPeG: no captions; write them to sub/d.txt')]:
        with pytest.raises(BadRecord, match=reason):
            source[index]
    (messy / 'a.png').unlink()
    (messy / 'b.TXT').unlink()
    with pytest.raises(BadRecord, match='^a.png: No such file'):
        source[0]
    with pytest.raises(BadRecord, match='^b.JPG: b.TXT: No such file'):
        source[1]


def test_folder_without_captions(messy):
    source = FolderSource(messy, captions_required=False)
    assert len(source) == 9
    assert source[7] == Record(picture(4, 'JPEG'), (), 'sub/d.JPeG')
    assert source[0].captions == source[4].captions == ()  # not even read


def make_folder(root, count):
    for i in range(count):
        write(root / f'part{i % 7}', **{f'{i:04}_png': b'', f'{i:04}_txt': b'x'})
    return root


def test_folder_splits_are_disjoint_and_stable(tmp_path):
    make_folder(tmp_path, 1000)
    everything, train, valid = (FolderSource(tmp_path, split).images
                                for split in ('all', 'train', 'valid'))
    assert sorted(train + valid) == everything and not set(train) & set(valid)
    assert abs(len(valid) - 50) < 4 * np.sqrt(1000 * 0.05 * 0.95)
    write(tmp_path, new_png=b'', new_txt=b'x')
    assert set(FolderSource(tmp_path, 'valid').images) - {'new.png'} == set(valid)


@pytest.mark.parametrize('count', [2, 5, 20])
def test_small_folders_have_something_to_validate_on(tmp_path, count):
    make_folder(tmp_path, count)
    write(tmp_path, **{f'uncaptioned{i}_png': b'' for i in range(10)})
    for captions_required in (True, False):
        train, valid = (FolderSource(tmp_path, split, captions_required=captions_required)
                        for split in ('train', 'valid'))
        assert len(train) + len(valid) == count + 10
        assert any(name.startswith('part') for name in valid.images)


def test_twins_share_their_split(tmp_path):
    for i in range(60):
        write(tmp_path, **{f'{i}_png': b'', f'{i}_jpg': b'', f'{i}_txt': b'x'})
    valid = FolderSource(tmp_path, 'valid').images
    assert {name[:-4] + '.png' for name in valid} == {n for n in valid if n.endswith('.png')}


def test_folder_errors_say_what_was_found_and_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match='no directory .*nowhere: expected images'):
        FolderSource(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='0 images.*expected images'):
        FolderSource(tmp_path)
    write(tmp_path, a_png=b'', b_png=b'', c_txt=b'x')
    with pytest.raises(ValueError, match='2 images.* 0 are usable and at least 1 needed.*x.txt'):
        FolderSource(tmp_path)
    assert len(FolderSource(tmp_path, captions_required=False)) == 2
    with pytest.raises(ValueError, match='2 are usable and at least 3 needed'):
        FolderSource(tmp_path, captions_required=False, min_images=3)
    with pytest.raises(ValueError, match="split 'test' of a folder is none of train, valid, all"):
        FolderSource(tmp_path, 'test')


FOLDER = DataConfig(source='folder', path='photos', batch_size=8)
SCENES = DataConfig(source='scenes', batch_size=8, valid_split='combos', train_length=40,
                    valid_length=20)


@pytest.mark.parametrize('config, change, message', [
    (FOLDER, {'source': 'web'}, "data.source is 'web'; it must be one of scenes, folder, tfds"),
    (FOLDER, {'path': ''}, "data.path is ''; it must be the directory that source 'folder' reads"),
    (FOLDER, {'train_split': 'test'}, 'train_split .* one of train, valid, all'),
    (FOLDER, {'scenes': {'size': 60}}, "empty unless source is 'scenes'"),
    (FOLDER, {'batch_size': 0}, 'data.batch_size is 0; it must be positive'),
    (FOLDER, {'crop': 'stage3'}, 'one of stage1, stage2, center, window, none'),
    (FOLDER, {'valid_crop': 'stage1'}, "'center' or 'none'"),
    (FOLDER, {'image_size': 32}, "together with crop 'window'"),
    (FOLDER, {'image_size': -1, 'crop': 'window'}, 'positive side'),
    (FOLDER, {'bpe_dropout': 10}, 'a probability'),
    (FOLDER, {'min_images': 0}, 'positive'),
    (FOLDER, {'workers': 0}, 'positive'),
    (SCENES, {'train_length': 0}, 'positive: the number of scenes'),
    (SCENES, {'valid_length': 0}, 'positive: the number of scenes'),
])
def test_config_errors_name_key_value_and_limit(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_open_folder(messy):
    config = dataclasses.replace(FOLDER, path=str(messy), valid_split='all')
    assert len(open_source(config, 'valid')) == 9
    assert len(open_source(config, 'train')) < 9
    with pytest.raises(BadRecord):
        open_source(config, 'valid')[7]
    assert open_source(config, 'valid', captions_required=False)[7].captions == ()
    with pytest.raises(ValueError, match="'all' is neither 'train' nor 'valid'"):
        open_source(config, 'all')
    with pytest.raises(ValueError, match='at least 99 needed'):
        open_source(dataclasses.replace(config, min_images=99), 'valid')


def test_open_scenes():
    config = dataclasses.replace(SCENES, scenes={'size': 48})
    train, valid = open_source(config, 'train'), open_source(config, 'valid')
    assert (len(train), len(valid)) == (40, 20)
    assert train[0].image.shape == (48, 48, 3) and train[0].captions
    same_split = dataclasses.replace(config, valid_split='train')
    assert not np.array_equal(open_source(same_split, 'valid')[0].image, train[0].image)
    with pytest.raises(ValueError, match='data.scenes.sise is unknown; there are size, colours'):
        open_source(dataclasses.replace(config, scenes={'sise': 60}), 'train')


def test_open_tfds(monkeypatch):
    opened = []
    fake = types.ModuleType('dalle_jax.data.tfds')
    fake.TfdsSource = lambda directory, split: opened.append((directory, split)) or 'source'
    monkeypatch.setitem(sys.modules, 'dalle_jax.data.tfds', fake)
    config = DataConfig(source='tfds', path='coco', batch_size=8, train_split='train[:90%]',
                        valid_split='train[90%:]')
    assert open_source(config, 'train') == open_source(config, 'valid') == 'source'
    assert opened == [('coco', 'train[:90%]'), ('coco', 'train[90%:]')]


def test_every_source_is_documented():
    for name in sources.SOURCES:
        assert f'    {name} ' in sources.__doc__
