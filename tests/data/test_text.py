"""The tokenizer against sentencepiece's encoder and the dropout algorithm as published."""

import collections
import io
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.data.records import BadRecord
from dalle_jax.data.text import BYTE_FALLBACK_FROM, PAD, UNKNOWN, Tokenizer

NEVER = 1e-15  # a dropout that runs our own merges and, in practice, drops none


def make_captions(count, seed=0):
    """Zipf-distributed made-up words, with some accents, capitals, digits and other scripts."""
    rng = random.Random(seed)
    letters = 'eeeeettaaoinshrdlucmfwypvbgk' + 'éßñ'
    words = [''.join(rng.choices(letters, k=rng.randint(1, 10))) for _ in range(800)]
    words += ['Photo', '1998', '日本', 'ДОМ', 'don\'t', '"x"']
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [' '.join(rng.choices(words, weights, k=rng.randint(1, 18))) for _ in range(count)]


CAPTIONS = make_captions(2000)
LARGE = Tokenizer.train(CAPTIONS, 2000)
SMALL = Tokenizer.train(CAPTIONS, 300)
BOTH = pytest.mark.parametrize('tokenizer', [LARGE, SMALL], ids=['bytes', 'no bytes'])


def reference(tokenizer):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)


def test_special_ids_and_size():
    assert LARGE.vocab_size == 2000
    model = reference(LARGE)
    assert [model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id()] == [0, 1, 2, 3]


def test_training_repeats_to_the_byte():
    again = Tokenizer.train(iter(CAPTIONS), 2000)
    assert again == LARGE and again.hash == LARGE.hash and len(again.hash) == 64
    assert SMALL.hash != LARGE.hash


@pytest.mark.parametrize('captions', [['a'], ['a red circle'], ['a red circle', 'a blue star'] * 9])
@pytest.mark.parametrize('size', [64, BYTE_FALLBACK_FROM, 16384])
def test_tiny_corpora_give_small_vocabularies(captions, size):
    tokenizer = Tokenizer.train(captions, size)
    assert tokenizer.vocab_size <= min(size, 400)
    for caption in captions:
        assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_normalisation():
    assert LARGE.encode('  A  PHOTO of\tÉ ') == LARGE.encode('a photo of é')
    assert LARGE.encode('ｐｈｏｔｏ ①') == LARGE.encode('photo 1')
    assert LARGE.decode(LARGE.encode('A Photo of ÉÑ')) == 'a photo of éñ'


def test_unseen_characters():
    text = 'a ☃🙂 photo'
    assert LARGE.decode(LARGE.encode(text)) == text and UNKNOWN not in LARGE.encode(text)
    assert SMALL.encode(text).count(UNKNOWN) == 1  # neighbouring unknowns are one


def test_decode_skips_padding_and_marks():
    ids = LARGE.encode('a photo')
    assert LARGE.decode(np.array([2, *ids, 3, 0, 0], np.int32)) == 'a photo'
    assert LARGE.decode([]) == ''


@BOTH
def test_our_merges_equal_sentencepiece_on_captions(tokenizer):
    rng, model = np.random.default_rng(0), reference(tokenizer)
    for caption in make_captions(2000, seed=1):
        assert tokenizer.encode_dropout(caption, NEVER, rng) == model.encode(caption)


@BOTH
@settings(max_examples=30, deadline=None)
@given(text=st.text() | st.text(alphabet='ab et\u2581\u3000\u200b<0x41>/s é日🙂', max_size=40))
def test_our_merges_equal_sentencepiece_on_any_text(tokenizer, text):
    expected = reference(tokenizer).encode(text)
    for encode in (tokenizer.encode,
                   lambda text: tokenizer.encode_dropout(text, 0, None),
                   lambda text: tokenizer.encode_dropout(text, NEVER, np.random.default_rng(0))):
        if expected:
            assert encode(text) == expected and PAD not in expected
        else:
            with pytest.raises(BadRecord, match='empty after normalisation'):
                encode(text)


@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=1), p=st.floats(0, 1), seed=st.integers(0, 99))
def test_dropout_keeps_the_text(text, p, seed):
    if not reference(LARGE).encode(text):
        return
    ids = LARGE.encode_dropout(text, p, np.random.default_rng(seed))
    assert LARGE.decode(ids) == LARGE.decode(LARGE.encode(text))
    assert PAD not in ids and ids == LARGE.encode_dropout(text, p, np.random.default_rng(seed))


def test_full_dropout_gives_characters_and_bytes():
    ids = LARGE.encode_dropout('Photo 🙂', 1, np.random.default_rng(0))
    model = reference(LARGE)
    assert [model.id_to_piece(i) for i in ids] == [
        *'\u2581photo\u2581', '<0xF0>', '<0x9F>', '<0x99>', '<0x82>']


def published_dropout(model, word, p, rng):
    """Provilkov et al. 2020, algorithm 1, to the letter: every pair is drawn for at every step."""
    pieces = list(word)
    while True:
        merges = []
        for i in range(len(pieces) - 1):
            piece = model.piece_to_id(pieces[i] + pieces[i + 1])
            if piece != UNKNOWN and rng.random() >= p:
                merges.append((-model.get_score(piece), i))
        if not merges:
            return tuple(model.piece_to_id(piece) for piece in pieces)
        _, i = min(merges)
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize('p', [0.1, 0.4])
def test_dropout_has_the_published_distribution(p):
    model, rng, draws = reference(LARGE), np.random.default_rng(0), 8000
    word = max((c for c in CAPTIONS[0].split() + CAPTIONS[1].split() if c.isascii()), key=len)
    text = f'{word} {word}'  # the second word starts wherever the first one's draws have ended
    half = len(published_dropout(model, '\u2581' + word, 0, rng))
    expected = collections.Counter(
        published_dropout(model, '\u2581' + word, p, rng) for _ in range(draws))
    first, second = collections.Counter(), collections.Counter()
    whole = tuple(LARGE.encode(word))
    both_whole = 0
    for _ in range(draws):
        ids = tuple(LARGE.encode_dropout(text, p, rng))
        marks = [i for i, piece in enumerate(ids) if model.id_to_piece(piece).startswith('\u2581')]
        first[ids[:marks[1]]] += 1
        second[ids[marks[1]:]] += 1
        both_whole += ids == whole + whole
    assert len(whole) == half and len(expected) > 5
    for counted in (first, second):
        distance = sum(abs(counted[k] - expected[k]) for k in counted | expected) / (2 * draws)
        # Two samples of k outcomes are about sqrt(k / (pi draws)) apart when their source is one.
        assert distance < 2 * np.sqrt(len(counted | expected) / (np.pi * draws))
    independent = first[whole] * second[whole] / draws ** 2
    assert abs(both_whole / draws - independent) < 4 * np.sqrt(independent / draws)


def test_dropout_of_one_merge_has_probability_p():
    tokenizer = Tokenizer.train(['a'] * 3, 64)  # its only merge: the space and the a
    rng = np.random.default_rng(0)
    split = sum(len(tokenizer.encode_dropout('a', 0.3, rng)) == 2 for _ in range(10000))
    assert abs(split / 10000 - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 10000)


def test_dropout_repeats_in_another_process(tmp_path):
    LARGE.save(tmp_path / 'text.model')
    code = ('import sys, numpy as np; from dalle_jax.data.text import Tokenizer;'
            'tokenizer = Tokenizer.load(sys.argv[1]); rng = np.random.default_rng(7);'
            'print([tokenizer.encode_dropout(c, .3, rng) for c in sys.argv[2:]])')
    captions = CAPTIONS[:20]
    output = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'text.model'), *captions],
                            capture_output=True, text=True, check=True).stdout
    rng = np.random.default_rng(7)
    assert output.strip() == str([LARGE.encode_dropout(c, 0.3, rng) for c in captions])


def test_dropout_rejects_non_probabilities():
    for p in (-0.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='not a probability'):
            LARGE.encode_dropout('a', p, np.random.default_rng(0))


def test_batch_pads_truncates_and_counts():
    captions = ['a', 'photo ' * 30, 'a photo']
    lengths = [len(LARGE.encode(caption)) for caption in captions]
    ids, truncated = LARGE.batch(captions, lengths[2])
    assert ids.dtype == np.int32 and ids.shape == (3, lengths[2]) and truncated == 1
    for row, caption in zip(ids, captions):
        expected = LARGE.encode(caption)[:lengths[2]]
        assert row.tolist() == expected + [PAD] * (lengths[2] - len(expected))
    dropped, _ = LARGE.batch(captions, 400, 0.5, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    for row, caption in zip(dropped, captions):
        expected = LARGE.encode_dropout(caption, 0.5, rng)
        assert row[:len(expected)].tolist() == expected and not row[len(expected):].any()
    with pytest.raises(BadRecord):
        LARGE.batch(['a', ' \n'], 8)


def test_save_load_pickle(tmp_path):
    LARGE.save(tmp_path / 'text.model')
    for copy in (Tokenizer.load(tmp_path / 'text.model'), pickle.loads(pickle.dumps(LARGE))):
        assert copy == LARGE and copy.encode(CAPTIONS[5]) == LARGE.encode(CAPTIONS[5])
    assert len(pickle.dumps(LARGE)) < len(LARGE.model) + 200


def test_threads_share_a_tokenizer():
    tokenizer = Tokenizer(LARGE.model)

    def encode(seed):
        rng = np.random.default_rng(seed)
        return [tokenizer.encode_dropout(caption, 0.2, rng) for caption in CAPTIONS[:100]]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(encode, range(8)))
    assert together == [encode(seed) for seed in range(8)]


@pytest.mark.parametrize('captions', [[], ['', '  \n'], iter(())])
def test_training_needs_captions(captions):
    with pytest.raises(ValueError, match='no captions'):
        Tokenizer.train(captions)


def test_training_errors_name_the_limit():
    with pytest.raises(ValueError, match='vocab_size 8 is too small.* 12 pieces'):
        Tokenizer.train(['a red circle'], 8)


def test_training_passes_on_the_errors_of_its_captions():
    def captions():
        yield 'a red circle'
        raise KeyError('broken source')

    with pytest.raises(KeyError, match='broken source'):
        Tokenizer.train(captions())


def test_long_captions_are_not_left_out():
    assert Tokenizer.train(['word ' * 2000 + 'quiz'], 64).decode(
        Tokenizer.train(['word ' * 2000 + 'quiz'], 64).encode('quiz')) == 'quiz'


def foreign_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=300, minloglevel=2,
        **options)
    return model.getvalue()


def test_loading_errors_name_the_file(tmp_path):
    path = tmp_path / 'text.model'
    with pytest.raises(FileNotFoundError, match='no tokenizer at .*text.model'):
        Tokenizer.load(path)
    for content, reason in [
        (b'', 'not a sentencepiece model'),
        (b'hello', 'not a sentencepiece model'),
        (LARGE.model[:500], 'not a sentencepiece model'),
        (foreign_model(model_type='bpe'), 'padding has id -1'),
        (foreign_model(model_type='unigram', pad_id=0, unk_id=1, bos_id=2, eos_id=3),
         'not a byte-pair encoding'),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'text.model: {reason}'):
            Tokenizer.load(path)
