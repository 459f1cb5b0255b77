"""Sampling through generate.Model: what an image depends on, prompts, guidance, memory, refusals.

The models' parameters are random, and large, so that tokens depend on everything the model reads.
"""

import copy
import math
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax import drawing, generate, runs
from dalle_jax.data.images import crop_clip
from dalle_jax.data.text import Tokenizer
from dalle_jax.generate import Sampling
from dalle_jax.models import clip, dalle, dvae
from dalle_jax.training import checkpoint, partition

CAPTIONS = ['a red circle', 'a large blue star above a ring', 'two small squares', 'green',
            'a ring']
DVAE = dvae.Config(image_size=16, vocab=24, widths=(8, 16), groups=2, n_init=8, patch=2)
DALLE = dalle.Config(depth=2, width=32, heads=2, text_length=12, grid=(4, 4), image_vocab=24,
                     patterns=('column', 'row'), caption_dropout=0.1)
CLIP = clip.Config(image_size=16, patch=8, image_width=16, image_depth=1, image_heads=2,
                   text_length=11, text_width=16, text_depth=1, text_heads=2, embedding=8)


def tiny_model(with_clip=True, mesh='replica=1', **arch):
    """A generate.Model of untrained runs, without any directory."""
    bpe = Tokenizer.train(CAPTIONS, 64)
    sizes = {'text_vocab': bpe.vocab_size}
    configs = {'dvae': DVAE, 'dalle': dalle.Config(**vars_of(DALLE) | sizes | arch),
               'clip': clip.Config(**vars_of(CLIP) | sizes)}

    def load(path, place):
        path = Path(path)
        module, config = {'dvae': dvae, 'dalle': dalle, 'clip': clip}[path.name], configs[path.name]
        rng, shapes = np.random.default_rng(0), jax.eval_shape(
            lambda: module.init(config, jax.random.key(0))[0])
        params = jax.tree_util.tree_map_with_path(lambda leaf, x: np.full(
            x.shape, {'gain': 1.0, 'bias': 0.0}.get(leaf[-1].key, rng.normal(0, 0.5, x.shape)),
            x.dtype), shapes)
        experiment = SimpleNamespace(model=path.name, precision='float32', frozen={'image': 'dvae'})
        return runs.Loaded(path, experiment, module, config,
                           jax.device_put(params, place(module, config)), 1,
                           None if path.name == 'dvae' else bpe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, 'load', load)
        return generate.Model('dalle', 'clip' if with_clip else None, mesh)


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@pytest.fixture(scope='module')
def model():
    return tiny_model()


@pytest.fixture(scope='module')
def eight(model):
    """Eight candidates of each caption, in batches of two captions."""
    return model.sample(CAPTIONS, 8, seed=3, batch=16)


def test_an_image_drawn_again_alone_is_the_same(model, eight):
    alone = model.sample(CAPTIONS[1:2], 1, seed=3, first=5)[0]
    np.testing.assert_array_equal(alone.ids[0], eight[1].ids[5])
    np.testing.assert_allclose(alone.logp[0], eight[1].logp[5], rtol=1e-4)
    np.testing.assert_allclose(alone.scores[0], eight[1].scores[5], atol=1e-4)
    assert len({row.tobytes() for drawn in eight for row in drawn.ids}) == 8 * len(CAPTIONS)


def test_tokens_do_not_depend_on_the_batch(model, eight):
    split = model.sample(CAPTIONS, 8, seed=3, batch=3)
    assert split[0].batch == (1, 3) and eight[0].batch == (2, 8)
    for a, b in zip(split, eight, strict=True):
        assert a.caption == b.caption and a.images.shape == (8, 16, 16, 3)
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logp, b.logp, rtol=1e-4)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
        assert a.logp_text == pytest.approx(b.logp_text, rel=1e-4)


def test_captions_left_out_do_not_change_a_bit_of_the_others(model, eight):
    told = []
    later = list(model.draw(CAPTIONS, Sampling(8, seed=3, batch=16), start=3, progress=told.append))
    assert [drawn.caption for drawn in later] == CAPTIONS[3:]
    assert told == [8, 8]  # of the batch of captions 2 and 3, and of the padded one
    for a, b in zip(later, eight[3:], strict=True):
        for name in ('images', 'ids', 'logp', 'scores'):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert not list(model.draw(CAPTIONS, Sampling(8, batch=16), start=5, progress=told.append))
    assert told == [8, 8]


def likelihood(model, caption, ids):
    """ln p(text) and ln p(image | text) of images of a caption, by the whole sequence at once."""
    text, _ = generate.encode_captions(model.run.tokenizer, [caption] * len(ids),
                                       DALLE.text_length - 1)
    full = jax.jit(dalle.likelihood, static_argnums=1)
    return full(model.run.params, model.run.config, text, ids)


def test_likelihoods_are_those_of_a_full_pass(model, eight):
    for drawn in eight:
        of_text, of_image = likelihood(model, drawn.caption, drawn.ids)
        np.testing.assert_allclose(drawn.logp, of_image, rtol=1e-4)
        np.testing.assert_allclose(drawn.logp_text, of_text, rtol=1e-4)


def test_guidance(model, eight):
    off = model.sample(CAPTIONS, 8, seed=3, batch=16, guidance=1.0)
    np.testing.assert_array_equal(off[2].ids, eight[2].ids)
    # At temperature 0 only the caption can make a difference, and at guidance 0 not even that.
    ignored = model.sample(CAPTIONS, 1, temperature=0, guidance=0.0)
    assert len({drawn.ids.tobytes() for drawn in ignored}) == 1
    followed = model.sample(CAPTIONS, 1, temperature=0, guidance=3.0)
    assert len({drawn.ids.tobytes() for drawn in followed}) == len(CAPTIONS)


@pytest.mark.parametrize('rows,columns', [(2, 0), (1, 3)])
def test_an_image_prompt_keeps_its_tokens_and_the_seed_draws_the_rest(model, rows, columns):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    codes = model.encode(image[None])[0]
    kept = np.zeros((4, 4), bool)
    kept[:rows] = kept[:, :columns] = True
    drawn = [model.sample(CAPTIONS[:2], 4, seed=seed, image=image, rows=rows, columns=columns)
             for seed in (0, 1)]
    for one in [*drawn[0], *drawn[1]]:
        assert (one.ids[:, kept] == codes[kept]).all()
    free = [one.ids[:, ~kept] for one in [*drawn[0], *drawn[1]]]
    assert all((free[0] != other).any() for other in free[1:])
    one = np.tile(drawn[0][0].ids, (2, 1, 1))  # eight, as in the other test: compiled once
    expected = likelihood(model, CAPTIONS[0], one)[1][:4]
    np.testing.assert_allclose(drawn[0][0].logp, expected, rtol=1e-4)


def test_pictures_decoded_in_parts_are_the_decoded_tokens(model, monkeypatch):
    monkeypatch.setitem(drawing.PIXELS_AT_ONCE, 'cpu', 2 * 16 * 16)
    drawn = model.sample(CAPTIONS[:1], 5)[0]
    np.testing.assert_array_equal(drawn.images, model.decode(drawn.ids))


def test_scores_in_parts_are_those_of_single_pairs(model, eight, monkeypatch):
    whole = model.score(CAPTIONS, np.stack([drawn.images[0] for drawn in eight]))
    np.testing.assert_allclose(whole, [drawn.scores[0] for drawn in eight], atol=1e-4)
    monkeypatch.setattr(drawing, 'ROWS_AT_ONCE', 2)
    parts = model.score(CAPTIONS, np.stack([drawn.images[0] for drawn in eight]))
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    assert len(parts) == 5
    with pytest.raises(ValueError, match='2 captions and 3 images'):
        model.score(CAPTIONS[:2], eight[0].images[:3])


MESHES = {'replica=2': (32, 128), 'fsdp=2': (16, 128), 'tensor=2': (32, 64)}


@pytest.fixture(scope='module')
def on_two():
    """Mesh -> the same model on two devices."""
    return {mesh: tiny_model(mesh=mesh) for mesh in MESHES}


@pytest.mark.parametrize('mesh,batch', [*zip(MESHES, (16, 3, 3))])  # two captions, or a part of one
def test_two_devices_draw_what_one_does(model, eight, on_two, mesh, batch):
    two = on_two[mesh]
    kernel = two.run.params['transformer']['tail']['0']['mlp']['up']['kernel']
    assert {shard.data.shape for shard in kernel.addressable_shards} == {MESHES[mesh]}
    assert len(kernel.addressable_shards) == 2 and two.fingerprints == model.fingerprints
    for a, b in zip(two.sample(CAPTIONS, 8, seed=3, batch=batch), eight, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.images.astype(int), b.images, atol=1)  # rounded
        np.testing.assert_allclose(a.logp, b.logp, rtol=1e-4)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
        assert a.logp_text == pytest.approx(b.logp_text, rel=1e-4)


@pytest.mark.parametrize('mesh', MESHES)
def test_two_devices_score_what_one_does(eight, on_two, monkeypatch, mesh):
    """Five images, which is no multiple of two; by likelihoods, which need their codes."""
    monkeypatch.setattr(on_two[mesh], 'clip_run', None)
    codes = np.stack([drawn.ids[0] for drawn in eight])
    monkeypatch.setattr(on_two[mesh], 'encode', lambda images: codes)
    found = on_two[mesh].score(CAPTIONS, np.zeros(5))
    np.testing.assert_allclose(found, [drawn.logp[0] for drawn in eight], rtol=1e-4)


def test_two_devices_encode_and_decode_what_one_does(model, eight, on_two):
    images, two = np.concatenate([drawn.images for drawn in eight])[:5], on_two['replica=2']
    codes = model.encode(images)
    np.testing.assert_array_equal(two.encode(images), codes)
    np.testing.assert_allclose(two.decode(codes).astype(int), model.decode(codes), atol=1)


def test_a_mesh_that_does_not_fit_is_refused(monkeypatch):
    for mesh, match in (('tensr=2', "mesh 'tensr=2': 'tensr=2'; write AXIS=EXTENT"),
                        ('fsdp', 'write AXIS=EXTENT'), ('tensor=1,tensor=2', 'at most once'),
                        ('tensor=3', 'needs 3 devices, but there are 2'),
                        ('replica=1,tensor=4', 'needs 4 devices, but there are 2')):
        with pytest.raises(ValueError, match=match):
            tiny_model(mesh=mesh)
    with pytest.raises(ValueError, match='tensor=2 does not divide the 1 heads of dalle; 1 do'):
        tiny_model(mesh='tensor=2', heads=1)
    monkeypatch.setattr(jax, 'process_count', lambda: 4)
    with pytest.raises(runs.RunError, match='dalle: this is one of 4 processes'):
        tiny_model()


def test_parameters_are_read_to_where_they_live(tmp_path):
    """And the averages, where there are any; the other arrays are not read."""
    State = namedtuple('State', 'params averages step')
    mesh = partition.make_mesh(partition.MeshConfig())
    place = {'w': NamedSharding(mesh, PartitionSpec('fsdp')), 'b': partition.replicated(mesh)}
    w = np.arange(24, dtype=np.float32).reshape(6, 4)
    for step, averages in enumerate([{}, {'w': 2 * w, 'b': w[0]}]):
        saved = checkpoint.Checkpoints(tmp_path / str(step))
        saved.save(3, jax.device_put(State({'w': w, 'b': w[0]}, averages, np.int32(3))))
        saved.close()
        found, params = checkpoint.restore_params(tmp_path / str(step), place)
        assert found == 3 and params['w'].sharding == place['w']
        assert {shard.data.shape for shard in params['w'].addressable_shards} == {(3, 4)}
        np.testing.assert_array_equal(params['w'], w * (1 + step))
        assert isinstance(checkpoint.restore_params(tmp_path / str(step))[1]['w'], np.ndarray)


@given(captions=st.integers(1, 20), candidates=st.integers(1, 40), ways=st.integers(1, 12))
def test_divided_batches_are_alike_and_as_full_as_they_can_be(captions, candidates, ways):
    rows, pieces, each = drawing.division(captions, candidates, ways)
    assert rows >= captions and pieces * each >= candidates and rows * pieces % ways == 0
    if ways == 1:
        assert (rows, pieces, each) == (captions, 1, candidates)
    # No worse than dividing captions alone, or the candidates of each.
    assert rows * pieces * each <= -(-captions // ways) * ways * candidates
    assert rows * pieces * each <= captions * -(-candidates // ways) * ways


@given(batch=st.integers(1, 600), captions=st.integers(1, 50), candidates=st.integers(1, 600))
def test_batches_are_as_few_and_as_full_as_they_can_be(batch, captions, candidates):
    rows, width = drawing.batch_shape(batch, captions, candidates)
    assert rows * width <= batch and rows <= captions and width <= candidates
    assert width == candidates or rows == 1
    parts, groups = math.ceil(candidates / width), math.ceil(captions / rows)
    assert parts == math.ceil(candidates / batch)
    assert parts > 1 or groups == math.ceil(captions / (batch // candidates))
    # What is drawn for nothing is less than one row in each batch.
    assert parts * width - candidates < parts and groups * rows - captions < groups


def test_candidates_that_do_not_fit_are_split_and_told(model, monkeypatch, capsys):
    def fit(free, **options):
        monkeypatch.setattr(drawing.machine, 'memory', lambda: free)
        return model.fit(Sampling(**options), captions=1).batch

    assert fit(2**40, candidates=8) == 64 and not capsys.readouterr().out
    assert fit(0, candidates=8, batch=100) == 100  # as asked for
    assert fit(2**40, candidates=512) == 64
    told = capsys.readouterr().out
    assert '512 candidates of a caption in 8 batches of 64: more than 64 at once are no' in told

    # 50 candidates in at most 16 at once are 4 times 13; in at most 32 they would be twice 25.
    weights = 4 * sum(x.size for x in jax.tree.leaves(model.run.params))
    need = [weights + drawing.decoding_bytes(model.image_run, n)
            + dalle.sample_bytes(model.run.config, 1, n, model.dtype, False) for n in (13, 25)]
    free = (need[0] + 1) / drawing.MEMORY_SHARE
    assert need[0] < need[1] and fit(int(free), candidates=50) == 16
    assert '50 candidates of a caption in 4 batches of 13: memory' in capsys.readouterr().out
    assert fit(int(free), candidates=50, guidance=2.0) < 16  # two branches
    batches = [fit(free, candidates=64) for free in range(0, 2**25, 2**21)]
    assert batches == sorted(batches) and batches[0] == 1
    assert all(math.log2(batch).is_integer() for batch in batches)


def test_memory_is_that_of_each_device(model, on_two, monkeypatch):
    """Two of a CPU, which share its memory."""
    def fit(model, free, candidates):
        monkeypatch.setattr(drawing.machine, 'memory', lambda: int(free / drawing.MEMORY_SHARE))
        return model.fit(Sampling(candidates=candidates), captions=1).batch

    fits = [(fit(model, free, 64), fit(on_two['replica=2'], 2 * free, 128))
            for free in range(0, 2**24, 2**20)]
    assert len(set(fits)) > 2 and all(two == 2 * one for one, two in fits)

    # With half of the heads, but all of the decoder: 50 candidates 4 times 13, see below.
    params = on_two['tensor=2'].run.params
    need = (sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
            + drawing.decoding_bytes(model.image_run, 13)
            + dalle.sample_bytes(model.run.config, 1, 13, model.dtype, False) // 2)
    assert fit(on_two['tensor=2'], 2 * need + 8, 50) == 16
    assert fit(on_two['tensor=2'], 2 * need - 8, 50) == 8


def test_decoding_bytes_cover_the_largest_activation(model):
    """At 16 px a group of 8 channels at 8 x 8, upsampled from 16 channels at 4 x 4."""
    one = drawing.decoding_bytes(model.image_run, 1)
    assert one >= 4 * 4 * 16 * 8 * 8
    assert drawing.decoding_bytes(model.image_run, 10) == 10 * one


def test_a_clip_of_another_size_is_shown_resized_images(model):
    """As with a published one, which reads 224 px whatever is drawn."""
    model, config = copy.copy(model), clip.Config(**vars_of(model.clip_run.config)
                                                  | {'image_size': 24})
    params = clip.init(config, jax.random.key(1))[0]
    model.clip_run = model.clip_run._replace(config=config, params=params)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    shown = np.stack([crop_clip(image, 24) for image in images])
    text = generate.encode_captions(model.clip_run.tokenizer, CAPTIONS, 11)[0]
    expected = jax.jit(clip.score, static_argnums=1)(params, config, shown, text)
    np.testing.assert_allclose(model.score(CAPTIONS, images), expected, atol=1e-5)
    np.testing.assert_allclose(model.score(CAPTIONS, shown), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r'images are float64 \[5, 16, 16, 3\]; expected uint8'):
        model.score(CAPTIONS, images / 255)


def test_what_a_run_cannot_draw_is_refused_at_once(model):
    def refused(match, captions=CAPTIONS, where=(), **options):
        with pytest.raises(ValueError, match=match):
            model.draw(captions, Sampling(**options), *where)  # nothing is drawn yet

    image = np.zeros((16, 16, 3), np.uint8)
    refused("caption 2 is empty \\('\\\\u200b'\\)", ['a', 'b', '\u200b'])
    refused('top_k is 25, and the image vocabulary has 24 tokens', top_k=25)
    refused(r'uint8 \[1, 15, 16, 3\]; expected uint8 \[batch, 16, 16, 3\]',
            where=(image[1:], 1, 0))
    refused('float64', where=(image / 255, 1, 0))
    for rows, columns in ((0, 0), (4, 0), (0, 4), (-1, 2)):
        refused(f'rows={rows} and columns={columns} .* up to 3, columns up to 3',
                where=(image, rows, columns))
    refused('rows=1 and columns=0 say what is kept of an image prompt', where=(None, 1, 0))


def test_guidance_needs_caption_dropout():
    model = tiny_model(with_clip=False, caption_dropout=0.0)
    with pytest.raises(ValueError, match='with arch.caption_dropout 0, so .*give guidance 1, or'):
        model.draw(CAPTIONS, Sampling(guidance=2.0))


@pytest.mark.parametrize('options,match', [
    ({'candidates': 0}, 'candidates is 0; give 1 or more'),
    ({'batch': -1}, 'batch is -1; it must be a number from 0 on'),
    ({'first': -1}, 'first is -1'),
    ({'top_k': -1}, 'top_k is -1'),
    ({'temperature': float('inf')}, 'temperature is inf'),
    ({'guidance': -0.5}, 'guidance is -0.5'),
    ({'guidance': float('nan')}, 'guidance is nan'),
    ({'top_p': 0.0}, 'top_p is 0.0')])
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        Sampling(**options)


def test_captions_that_stand_twice_can_have_other_images(model):
    four, = model.sample(['a red circle'], n=4, seed=5, batch=4)
    drawn = [*model.draw(['a red circle', 'a red circle'], Sampling(2, seed=5, batch=4),
                         firsts=[0, 2])]
    np.testing.assert_array_equal(np.concatenate([d.ids for d in drawn]), four.ids)
