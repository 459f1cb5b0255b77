"""Batches as a function of (seed, step): everything follows from comparing batches."""

import gc
import math
import threading
import time
import traceback
import weakref
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_jax.data.pipeline import ATTEMPTS, EXAMPLES, Pipeline, permute
from dalle_jax.data.records import BadRecord, Record
from dalle_jax.data.sources import FolderSource
from dalle_jax.data.text import Tokenizer

SIDE = 8
TOKENIZER = Tokenizer.train([f'record {i} as it is in other words' for i in range(300)], 200)


class Numbered:
    """Record i is an image that spells i in its pixels; some indices are bad."""

    def __init__(self, length, bad=(), captions=('record {} as it is', 'record {} in other words')):
        self.length, self.bad, self.captions, self.seen = length, frozenset(bad), captions, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        self.seen.append(index)
        if index in self.bad:
            raise BadRecord(f'record{index}: spoilt')
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        image[0, 0] = index % 256, index // 256 % 256, index // 65536
        return Record(image, tuple(c.format(index) for c in self.captions), f'record{index}')


def indices(batch):
    return batch['image'][:, 0, 0].astype(int) @ [1, 256, 65536]


def make(source=None, **options):
    options = {'batch_size': 4, 'seed': 0, 'image_size': SIDE} | options
    return Pipeline(source or Numbered(10), **options)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


TEXT = {'text_length': 24, 'tokenizer': TOKENIZER, 'bpe_dropout': 0.2}


# --- order ----------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 300) | st.sampled_from([511, 512, 513, 5000]),
       seed=st.integers(0, 2**32), epoch=st.integers(0, 2**40))
def test_permute_is_a_bijection_of_every_epoch(length, seed, epoch):
    everything = np.arange(length)
    out = permute(everything, np.full(length, epoch), length, seed)
    np.testing.assert_array_equal(np.sort(out), everything)
    # Elements of several epochs at once do not disturb each other.
    mixed = permute(np.repeat(everything, 2), np.tile([epoch, epoch + 1], length), length, seed)
    np.testing.assert_array_equal(mixed[::2], out)


def test_permute_reaches_large_lengths():
    length = 250_000_000
    out = permute(np.arange(1000), np.zeros(1000, int), length, 0)
    assert len(set(out.tolist())) == 1000 and 0 <= out.min() and out.max() < length
    assert abs(out.mean() / length - 0.5) < 4 / np.sqrt(12 * 1000)


def test_all_orders_are_equally_likely():
    epochs, length = 200 * math.factorial(5), 5
    orders = np.stack([permute(np.full(epochs, i), np.arange(epochs), length, 1)
                       for i in range(length)], 1)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == math.factorial(5)
    chi2 = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert chi2 < 119 + 5 * np.sqrt(2 * 119)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 60), batch_size=st.integers(1, 17), seed=st.integers(0, 9))
def test_every_record_once_an_epoch(length, batch_size, seed):
    pipeline = make(Numbered(length), batch_size=batch_size, seed=seed)
    steps = -(-2 * length // batch_size)
    order = np.concatenate([indices(pipeline.batch(step)) for step in range(steps)])[:2 * length]
    np.testing.assert_array_equal(np.sort(order.reshape(2, length)), [range(length)] * 2)


def test_epochs_and_seeds_differ_in_order():
    orders = [indices(make(Numbered(100), batch_size=100, seed=seed).batch(step)).tolist()
              for seed in (0, 1) for step in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(100)) not in orders


def test_without_shuffling_records_come_in_order():
    pipeline = make(Numbered(10), shuffle=False)
    order = np.concatenate([indices(pipeline.batch(step)) for step in range(5)])
    np.testing.assert_array_equal(order, [*range(10)] * 2)
    assert_equal(pipeline.batch(0), make(Numbered(10), shuffle=False).batch(5))


# --- purity ---------------------------------------------------------------------------------------

def test_a_batch_does_not_depend_on_what_was_made_before():
    running = make(Numbered(50, bad=[3, 4]), **TEXT)
    batches = [running.batch(step) for step in range(12)]
    assert_equal(make(Numbered(50, bad=[3, 4]), **TEXT).batch(7), batches[7])
    assert_equal(running.batch(2), batches[2])
    assert not np.array_equal(make(Numbered(50), seed=1, **TEXT).batch(7)['text'],
                              batches[7]['text'])


@pytest.mark.parametrize('crop', ['none', 'window'])
def test_processes_share_the_batch(crop):
    options = dict(TEXT, batch_size=8, crop=crop, image_size=SIDE if crop == 'none' else 5, seed=3)
    whole = make(Numbered(50, bad=range(20)), **options)
    for divided in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[2, 6], [0, 1, 5], [3], [4, 7, 0]]):
        parts = [make(Numbered(50, bad=range(20)), rows=rows, **options) for rows in divided]
        for step in (0, 6, 40):
            expected = whole.batch(step)
            for rows, part in zip(divided, parts):
                assert_equal(part.batch(step), {name: x[rows] for name, x in expected.items()})
        assert sum(part.problems.replaced for part in parts) > 0


def test_shapes_and_types():
    batch = make(text_length=24, tokenizer=TOKENIZER).batch(0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        'image': ((4, SIDE, SIDE, 3), np.uint8), 'text': ((4, 24), np.int32)}
    assert make().batch(0).keys() == {'image'}
    assert make(image_size=None, **TEXT).batch(0).keys() == {'text'}


def test_text_is_one_of_the_captions_of_the_image():
    pipeline = make(Numbered(200), batch_size=100, text_length=40, tokenizer=TOKENIZER)
    batch = pipeline.batch(0)
    kinds = Counter()
    for index, ids in zip(indices(batch), batch['text']):
        texts = [f'record {index} as it is', f'record {index} in other words']
        kinds[texts.index(TOKENIZER.decode(ids))] += 1
    assert abs(kinds[0] - 50) < 4 * np.sqrt(100 / 4)


def test_draws_differ_between_epochs():
    pipeline = make(Numbered(1), batch_size=1, text_length=40, tokenizer=TOKENIZER, bpe_dropout=0.5)
    assert len({pipeline.batch(step)['text'].tobytes() for step in range(20)}) > 10


# --- bad records ----------------------------------------------------------------------------------

def test_bad_records_are_replaced_counted_and_named():
    bad = {2, 5, 11}
    pipeline, clean = (make(Numbered(40, bad=b), batch_size=40) for b in (bad, ()))
    got, expected = indices(pipeline.batch(0)), indices(clean.batch(0))
    spoilt = np.isin(expected, list(bad))
    np.testing.assert_array_equal(got[~spoilt], expected[~spoilt])
    assert spoilt.sum() == 3 and not bad & set(got.tolist())
    assert pipeline.problems.replaced >= 3
    assert set(pipeline.problems.examples) == {f'record{i}: spoilt' for i in bad}
    assert 'bad records replaced' in str(pipeline.problems) and 'record11' in str(pipeline.problems)


def test_replacements_are_spread_over_the_source():
    pipeline = make(Numbered(100, bad=range(50)), batch_size=100)
    firsts = [indices(pipeline.batch(step)) for step in range(20)]
    counts = np.bincount(np.concatenate(firsts), minlength=100)
    assert not counts[:50].any() and counts[50:].min() >= 20 and counts.max() < 20 * 2 + 25


def test_examples_are_few_and_distinct():
    pipeline = make(Numbered(200, bad=range(100)), batch_size=50)
    for step in range(8):
        pipeline.batch(step)
    assert pipeline.problems.replaced > 100
    assert len(pipeline.problems.examples) == len(set(pipeline.problems.examples)) == EXAMPLES


def test_empty_missing_and_unfitting_are_bad_records():
    for source, options, message in [
        (Numbered(9, captions=()), TEXT, 'record[0-9]: no captions'),
        (Numbered(9, captions=('\u200b',)), TEXT, 'record[0-9]: caption .* is empty'),
        (Numbered(9), {'image_size': 9}, 'record[0-9]: 8 x 8 pixels'),
        (Numbered(9), {'image_size': 9, 'crop': 'stage1'}, 'record[0-9]: 8 x 8 pixels'),
    ]:
        with pytest.raises(RuntimeError, match=f'(?s)16 records in a row are bad.*{message}'):
            make(source, **options).batch(0)


def test_a_messy_folder_trains_on_what_is_good(tmp_path):
    for i in range(12):
        pixels = np.full((SIDE + 4, SIDE + 9, 3), 20 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{i:02}.png')
        (tmp_path / f'{i:02}.txt').write_text(f'record {i}')
    Image.new('RGB', (SIDE, SIDE - 1)).save(tmp_path / '03.png')
    (tmp_path / '05.png').write_bytes(b'no image')
    (tmp_path / '07.txt').write_text(' ')
    (tmp_path / '09.txt').unlink()
    pipeline = make(FolderSource(tmp_path), batch_size=12, crop='stage2', **TEXT)
    batch = pipeline.batch(0)
    numbers = (batch['image'][:, 0, 0, 0] // 20).tolist()
    assert set(numbers) == set(range(12)) - {3, 5, 7, 9}
    assert [TOKENIZER.decode(ids) for ids in batch['text']] == [f'record {i}' for i in numbers]
    assert {message.split(':')[0] for message in pipeline.problems.examples} == {
        '03.png', '05.png', '07.png', '09.png'}


def test_a_source_of_bad_records_ends_in_an_error_with_the_count():
    source = Numbered(1000, bad=range(1000))
    pipeline = make(source)
    with pytest.raises(RuntimeError, match=r'(?s)\(16 bad ones so far, of 1000 in the source'
                                           r'\).*record\d+: spoilt'):
        pipeline.batch(0)
    assert len(source.seen) == ATTEMPTS and len(set(source.seen)) > ATTEMPTS / 2


def test_other_errors_are_not_swallowed():
    source = Numbered(10)
    source.captions = (None,)
    with pytest.raises(AttributeError):
        make(source).batch(0)


def test_truncated_captions_are_counted():
    pipeline = make(image_size=None, text_length=2, tokenizer=TOKENIZER)
    assert pipeline.batch(0)['text'].all() and pipeline.problems.truncated == 4
    assert pipeline.problems.replaced == 0 and '4 captions truncated' in str(pipeline.problems)


# --- prefetch -------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers, depth', [(1, 1), (3, None), (4, 9)])
def test_prefetch_equals_batch_in_order(workers, depth):
    pipeline = make(Numbered(50, bad=[3]), **TEXT)
    made = list(pipeline.prefetch(2, 23, workers=workers, depth=depth))
    assert [step for step, _ in made] == list(range(2, 23))
    for step, batch in made:
        assert_equal(batch, pipeline.batch(step))


def test_prefetch_keeps_the_order_of_slow_batches():
    class Uneven(Numbered):
        def __getitem__(self, index):
            time.sleep(0.002 * (index % 3))
            return super().__getitem__(index)

    pipeline = make(Uneven(30), batch_size=1, shuffle=False)
    made = [int(indices(batch)[0]) for _, batch in pipeline.prefetch(0, 30, workers=4)]
    assert made == list(range(30))


def test_prefetch_groups_steps_on_a_new_axis():
    pipeline = make(Numbered(50), **TEXT)
    made = list(pipeline.prefetch(3, 15, group=4))
    assert [step for step, _ in made] == [3, 7, 11]
    for step, group in made:
        assert group['image'].shape == (4, 4, SIDE, SIDE, 3)
        for k in range(4):
            assert_equal({name: value[k] for name, value in group.items()},
                         pipeline.batch(step + k))


def test_prefetch_without_end_works_ahead_only_so_far():
    source = Numbered(1000)
    with make(source, batch_size=1).prefetch(5, workers=2, depth=3) as batches:
        assert [next(batches)[0] for _ in range(10)] == list(range(5, 15))
        time.sleep(0.05)
        assert 10 <= len(source.seen) <= 10 + 3
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_passes_errors_on_with_their_traceback():
    class Broken(Numbered):
        def __getitem__(self, index):
            if index == 5:
                raise OSError('disk on fire')
            return super().__getitem__(index)

    batches = make(Broken(10), batch_size=1, shuffle=False).prefetch(0, 10)
    steps = []
    with pytest.raises(OSError, match='disk on fire') as error:
        for step, _ in batches:
            steps.append(step)
    assert steps == [0, 1, 2, 3, 4]
    frames = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert '__getitem__' in frames and '_example' in frames
    assert list(batches) == []


def test_abandoned_prefetch_frees_itself_and_its_threads():
    def threads():
        return [t for t in threading.enumerate() if t.name.startswith('batches')]

    def settle(count):
        for _ in range(200):
            gc.collect()
            if len(threads()) == count:
                return True
            time.sleep(0.01)

    assert settle(0)
    batches = make(Numbered(1000)).prefetch(0, workers=3)
    next(batches)
    assert threads()
    gone = weakref.ref(batches)
    del batches
    assert gone() is None and settle(0)


def test_prefetch_measures_waiting():
    class Slow(Numbered):
        def __getitem__(self, index):
            time.sleep(0.05)
            return super().__getitem__(index)

    slow = make(Slow(10), batch_size=1).prefetch(0, 5, workers=1, depth=1)
    list(slow)
    assert slow.wait_seconds >= 0.2
    ahead = make(Slow(10), batch_size=1).prefetch(0, 4, workers=4, depth=4)
    next(ahead)
    first = ahead.wait_seconds
    time.sleep(0.3)
    list(ahead)
    assert ahead.wait_seconds - first < 0.1


def test_arguments_are_checked():
    for options, message in [
        ({'batch_size': 0}, 'batch_size 0 and 0 rows of it'),
        ({'batch_size': 6, 'rows': []}, 'batch_size 6 and 0 rows of it'),
        ({'batch_size': 6, 'rows': [2, 6]}, 'rows 2 to 6 are not all in a batch of 6'),
        ({'image_size': None}, 'image_size, text_length or both'),
        ({'text_length': 8}, 'text_length 8 needs a tokenizer'),
        ({'crop': 'stage3'}, "crop 'stage3' is none of stage1"),
        ({'seed': -1}, 'seed -1 is negative'),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match='no records'):
        Pipeline(Numbered(0), batch_size=1, seed=0, image_size=SIDE)
    with pytest.raises(ValueError, match='steps 0 to 10 do not divide into groups of 4'):
        make().prefetch(0, 10, group=4)
    with pytest.raises(ValueError, match='workers 0'):
        make().prefetch(0, 10, workers=0)
