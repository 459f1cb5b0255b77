"""Token records: what is written is what is read, and every kind of damage is named."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.data import sources, tokens
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.records import BadRecord, Record
from dalle_jax.data.sources import DataConfig, open_source
from dalle_jax.data.text import Tokenizer

GRID = (2, 3)


def write(directory, shards, vocab=50, crops=2):
    """Lists of records with codes as the shards of 'train'; the last of them also as 'valid'."""
    (directory / 'parts').mkdir(parents=True)
    counts = {}
    for split, lists in (('train', shards), ('valid', shards[-1:])):
        for number, records in enumerate(lists):
            codes = np.reshape([r.codes for r in records], (-1, crops, *GRID))
            tokens.write_shard(tokens.shard_file(directory, split, number),
                               codes.astype(tokens.code_dtype(vocab)),
                               [tokens.caption_line(r) for r in records], ['spoilt.png: broken'])
        counts[split] = tokens.join_shards(directory, split, len(lists))
    tokens.finish(directory, {
        'tokenizer': {'run': 'runs/a', 'fingerprint': 'aaaa', 'grid': GRID, 'vocab': vocab},
        'splits': counts})
    return directory


def make(count=7, crops=2, vocab=50):
    rng = np.random.default_rng(0)
    return [Record(None, (f'record {i} as it is', f'число {i} 🎨'), f'é/{i}.png',
                   rng.integers(0, vocab, (crops, *GRID))) for i in range(count)]


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / 'tokens', [make()[:4], make()[4:]])


# Captions of any characters; names that the file system allows although they are no Unicode.
CAPTIONS = st.lists(st.text(), min_size=1, max_size=3).map(tuple)
NAMES = st.text() | st.binary(max_size=4).map(lambda b: b.decode(errors='surrogateescape'))


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.tuples(CAPTIONS, NAMES), min_size=1, max_size=4), first=st.integers(0, 3),
       crops=st.integers(1, 3), vocab=st.sampled_from([2, 2**16, 2**16 + 1]))
def test_what_is_written_is_read(texts, first, crops, vocab):
    rng = np.random.default_rng(first)
    records = [Record(None, captions, name, rng.integers(vocab - 2, vocab, (crops, *GRID)))
               for captions, name in texts]
    # The middle shard is one whose records are all bad.
    first = min(first, len(records) - 1)
    shards = [records[:first], [], records[first:]]
    with tempfile.TemporaryDirectory() as path:
        directory = write(Path(path) / 'tokens', shards, vocab, crops)
        source = tokens.TokenSource(directory, 'train')
        assert len(source) == len(records)
        for i, wanted in enumerate(records):
            assert source[i][:3] == wanted[:3] and source.captions(i) == wanted.captions
            np.testing.assert_array_equal(source[i].codes, wanted.codes)
        assert source.image_tokenizer == ('runs/a', 'aaaa', GRID, vocab)
        assert json.loads((directory / 'meta.json').read_text())['splits']['train']['left_out'] == 3
        assert (directory / 'train' / 'left_out.txt').read_text() == 'spoilt.png: broken\n' * 3
        assert not (directory / 'parts').exists()
        stored = np.load(directory / 'train' / 'codes.npy')
        assert stored.dtype == (np.uint16 if vocab <= 65536 else np.int32)


def test_codes_are_mapped_not_read(directory):
    """What is written into the file after opening is what a record holds."""
    source = tokens.TokenSource(directory, 'train')
    before = source[5].codes.copy()
    changed = np.load(directory / 'train' / 'codes.npy', mmap_mode='r+')
    changed[5] = (before + 1) % 50
    changed.flush()
    np.testing.assert_array_equal(source[5].codes, (before + 1) % 50)
    lines = np.memmap(directory / 'train' / 'captions.jsonl', np.uint8, 'r+')
    lines[:10] = ord('x')
    with pytest.raises(BadRecord, match='record 0 of .*captions are damaged'):
        source[0]


def test_an_index_beyond_the_end(directory):
    source = tokens.TokenSource(directory, 'valid')
    assert [record.name for record in source] == ['é/4.png', 'é/5.png', 'é/6.png']
    for index in (3, -1):
        with pytest.raises(IndexError, match=f'no record {index}, there are 3'):
            source[index]


# --- through the pipeline -------------------------------------------------------------------------

def test_batches_have_codes_of_a_crop_chosen_at_random(tmp_path):
    written = make(6, crops=3)
    directory = write(tmp_path / 'tokens', [written], crops=3)
    config = DataConfig(source='tokens', path=str(directory), batch_size=4)
    source = open_source(config, 'train')
    tokenizer = Tokenizer.train(sources.captions(source, 100), 100)
    pipeline = Pipeline(source, batch_size=4, seed=1, grid=GRID, text_length=20,
                        tokenizer=tokenizer)
    chosen = set()
    for step in range(12):
        batch = pipeline.batch(step)
        assert batch.keys() == {'codes', 'text'} and batch['codes'].dtype == np.int32
        for codes, text in zip(batch['codes'], batch['text']):
            (place,) = [(i, k) for i, record in enumerate(written) for k in range(3)
                        if (record.codes[k] == codes).all()]
            caption = tokenizer.decode(text)
            assert caption in written[place[0]].captions
            chosen.add((*place, caption))
    assert len(chosen) > 24  # of 36: 6 records x 3 crops x 2 captions, in 48 draws
    again = Pipeline(source, batch_size=4, seed=1, grid=GRID, text_length=20, tokenizer=tokenizer)
    np.testing.assert_array_equal(again.batch(11)['codes'], batch['codes'])


def test_codes_out_of_range_are_bad_records(tmp_path):
    written = make(6)
    written[2].codes[1, 0, 0] = 50
    source = tokens.TokenSource(write(tmp_path / 'tokens', [written]), 'train')
    with pytest.raises(BadRecord, match='é/2.png: .* holds the code 50, and there are 50'):
        source[2]
    pipeline = Pipeline(source, batch_size=6, seed=0, grid=GRID)
    assert pipeline.batch(0)['codes'].max() < 50 and pipeline.problems.replaced == 1
    negative = [record._replace(codes=-record.codes - 1) for record in make()]
    source = tokens.TokenSource(write(tmp_path / 'negative', [negative], 70_000), 'train')
    with pytest.raises(RuntimeError, match='records in a row are bad(.|\n)*holds the code -'):
        Pipeline(source, batch_size=6, seed=0, grid=GRID).batch(0)


# --- damage ---------------------------------------------------------------------------------------

def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def edit(file, **values):
    meta = json.loads(file.read_text())
    for key, value in values.items():
        section = meta if key == 'format' else meta['tokenizer']
        section[key] = value
    file.write_text(json.dumps(meta))


@pytest.mark.parametrize('name, damage, error, message', [
    ('meta.json', Path.unlink, FileNotFoundError, r'has no meta.json: write token records with'),
    ('meta.json', cut, ValueError, 'meta.json cannot be read'),
    ('meta.json', lambda f: f.write_text('{"format": 1}'), ValueError, "json lacks 'tokenizer'"),
    ('meta.json', lambda f: edit(f, format=7), ValueError, 'is of format 7, and .* reads 1'),
    ('meta.json', lambda f: edit(f, grid=[3, 3]), ValueError,
     r'codes.npy holds uint16 \[7, 2, 2, 3\], and meta.json says uint16 \[7, 2, 3, 3\]'),
    ('meta.json', lambda f: edit(f, vocab=70_000), ValueError, 'holds uint16 .* says int32'),
    ('train/codes.npy', Path.unlink, FileNotFoundError, 'codes.npy is missing'),
    ('train/codes.npy', cut, ValueError, 'codes.npy is cut short or damaged'),
    ('train/codes.npy', lambda f: f.write_bytes(b''), ValueError, 'codes.npy is cut short'),
    ('train/offsets.npy', Path.unlink, FileNotFoundError, 'offsets.npy is missing'),
    ('train/offsets.npy', cut, ValueError, 'offsets.npy is cut short or damaged'),
    ('train/captions.jsonl', Path.unlink, FileNotFoundError, 'captions.jsonl is missing'),
    ('train/captions.jsonl', cut, ValueError, 'captions.jsonl has .* its offsets want'),
])
def test_damage_is_named_on_opening(directory, name, damage, error, message):
    damage(directory / name)
    with pytest.raises(error, match=message):
        tokens.TokenSource(directory, 'train')


def test_what_cannot_be_opened_is_named(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere is not there: write token records'):
        tokens.TokenSource(tmp_path / 'nowhere', 'train')
    with pytest.raises(ValueError, match="'test' of token records is none of train, valid"):
        tokens.TokenSource(directory, 'test')
    with pytest.raises(ValueError, match='holds codes of runs/a with the fingerprint aaaa, and '
                                         'those of bbbb are asked for'):
        open_source(DataConfig(source='tokens', path=str(directory), batch_size=1,
                               tokenizer='bbbb'), 'train')
    (directory / 'meta.json').unlink()
    (directory / 'parts').mkdir()
    with pytest.raises(FileNotFoundError, match='not finished: run its encode command again'):
        tokens.TokenSource(directory, 'train')


def test_a_damaged_shard_and_one_without_good_records_are_named(tmp_path):
    (tmp_path / 'parts').mkdir()
    file = tokens.shard_file(tmp_path, 'train', 0)
    tokens.write_shard(file, np.zeros((0, 2, *GRID), np.uint16), [], ['a.png: broken', 'b.png: no'])
    with pytest.raises(ValueError, match="all 2 records of split 'train' are bad; .*a.png: broken"):
        tokens.join_shards(tmp_path, 'train', 1)
    cut(file)
    with pytest.raises(ValueError, match='train-000000.npz is damaged .* remove it and run the'):
        tokens.join_shards(tmp_path, 'train', 1)


@pytest.mark.parametrize('change, message', [
    ({'train_split': 'all'}, "data.train_split is 'all'; it must be one of train, valid"),
    ({'image_size': 8, 'crop': 'window'}, "data.image_size is 8; it must be 0 where source is"),
    ({'path': ''}, "the directory that source 'tokens' reads"),
    ({'source': 'folder', 'tokenizer': 'aaaa'}, "data.tokenizer is 'aaaa'; it must be empty"),
])
def test_config_errors(change, message):
    config = DataConfig(source='tokens', path='tokens', batch_size=8)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_a_copied_directory_reads_the_same(directory, tmp_path):
    shutil.copytree(directory, tmp_path / 'copy')
    for a, b in zip(tokens.TokenSource(directory, 'train'),
                    tokens.TokenSource(tmp_path / 'copy', 'train')):
        assert a[:3] == b[:3]
        np.testing.assert_array_equal(a.codes, b.codes)
