"""Captions are chosen at random, once each, and only where there is an image."""

import io

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data.records import BadRecord, Record
from dalle_jax.evaluation import pairs as lib


def png(value, side=8):
    file = io.BytesIO()
    Image.fromarray(np.full((side, side + 2, 3), value, np.uint8)).save(file, 'PNG')
    return file.getvalue()


class Source:
    """Record i has 1 + i % 3 captions; 4 has none, 5 is no image, 6 is too small."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i == 4:
            raise BadRecord('r4: no captions')
        image = b'no image' if i == 5 else png(i, 4 if i == 6 else 8)
        return Record(image, tuple(f'caption {i // 2} {k}' for k in range(1 + i % 3)), f'r{i}')


def choose(count, seed=0, exclude=()):
    return lib.choose(Source(), count, seed, 'center', 8, exclude)


def test_the_same_seed_chooses_the_same():
    one, again, other = choose(12), choose(12), choose(12, seed=1)
    assert one == again and one.hash == again.hash
    assert set(one.ids) != set(other.ids) and one.hash != other.hash
    assert len(set(one.ids)) == 12
    for name, caption, i in zip(one.ids, one.captions, one.records):
        record, _, k = name.partition('#')
        assert record == f'r{i}' and caption == Source()[i].captions[int(k)]


def test_more_captions_begin_with_fewer():
    assert choose(20).ids[:7] == choose(7).ids


def test_all_that_differ_in_their_order():
    found = choose(0)
    expected = dict.fromkeys(
        c for i in range(20) if i not in (4, 5, 6) for c in Source()[i].captions)
    assert list(found.captions) == list(expected)
    assert found.left_out_count == 3
    assert [why.partition(':')[0] for why in found.left_out] == ['r4', 'r5', 'r6']


def test_names_that_are_left_out():
    found = choose(0, exclude={'r0', 'r1', 'r5'})
    assert not {'r0', 'r1'} & {name.partition('#')[0] for name in found.ids}
    assert found.excluded == 2 and choose(0).excluded == 0  # r5 cannot be read at all
    usable = sum(len(Source()[i].captions) for i in range(20) if i not in (4, 5, 6))
    assert len(choose(usable).ids) == usable
    with pytest.raises(ValueError, match=f'{usable} captions can be used, and {usable + 1} are '
                                         r'asked for; 3 records are left out, and 0 excluded(.|\n)*no captions'):
        choose(usable + 1)


def test_images_are_those_of_the_records():
    found = choose(5)
    for n, i in enumerate(found.records):
        image = lib.real_image(Source(), found, n, 'center', 8)
        assert image.shape == (8, 8, 3) and int(image[0, 0, 0]) == i
    for changed in (found._replace(records=found.records[::-1]),
                    found._replace(images=('0',) * 5)):
        with pytest.raises(ValueError, match='the data have changed since captions were chosen'):
            lib.real_image(Source(), changed, 0, 'center', 8)
    assert found.images_hash != choose(4).images_hash


@pytest.mark.parametrize('count', [0, 1, lib.PARTS, lib.PARTS + 1, 730])
def test_threads_keep_the_order(count):
    parts = list(lib.in_threads(lambda i: i * i, count))
    assert sum(parts, []) == [i * i for i in range(count)]
    assert all(len(part) == lib.PARTS for part in parts[:-1])


def test_errors_in_threads_come_in_their_turn():
    def fail(i):
        if i == 150:
            raise BadRecord('r150')
        return i

    made = lib.in_threads(fail, 300)
    assert next(made) == list(range(lib.PARTS))
    with pytest.raises(BadRecord, match='r150'):
        next(made)
