"""All stages on a tiny budget, and everything one can do with their runs afterwards."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image

import dalle_jax
from dalle_jax import config as config_lib
from dalle_jax import evaluate, export, generate, runs, sample, train
from dalle_jax.data.scenes import SceneConfig, Scenes
from dalle_jax.evaluation import scenes_page
from dalle_jax.training.checkpoint import CheckpointError

CAPTIONS = ['a small red circle on a white background',
            'a large blue star above a small green ring on a black background',
            'a small orange square on a black background']


QUICK = {'loop.valid_batches': 2, 'loop.log_every': 10, 'loop.save_every': 20,
         'optimizer.name': 'adamw'}
SMALL_DVAE = {'arch.widths': (16, 32), 'arch.blocks_per_group': 1, 'arch.n_init': 32,
              'arch.vocab': 64}
SMALL_DALLE = {'arch.width': 32, 'arch.heads': 2, 'arch.depth': 2}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Directories of a dVAE, a DALL-E and a CLIP run of twenty steps."""
    root = tmp_path_factory.mktemp('runs')

    def stage(name, values):
        lengths = {'data.train_length': 512, 'data.valid_length': 32}
        config = config_lib.load(f'experiments/{name}.py:scenes,steps=20,batch=8',
                                 QUICK | lengths | values)
        train.run(config, root / name)

    stage('dvae', SMALL_DVAE)
    stage('dalle', SMALL_DALLE | {'frozen.image': str(root / 'dvae')})
    stage('clip', {'frozen.text': str(root / 'dalle'), 'arch.image_depth': 1, 'arch.text_depth': 1})
    return root


@pytest.fixture(scope='module')
def model(trained):
    return dalle_jax.load(trained / 'dalle', clip=trained / 'clip')


def test_stages_agree_on_sizes_and_text(trained, model):
    """The experiment file says 512 codes; the transformer has what its tokenizer has."""
    assert model.run.config.image_vocab == 64 == model.image_run.config.vocab
    assert model.run.config.text_vocab == model.run.tokenizer.vocab_size
    assert runs.load(trained / 'clip').tokenizer == model.run.tokenizer


def test_sampling_repeats_and_is_independent_of_the_batch(model):
    drawn = model.sample(CAPTIONS, n=3, seed=5, temperature=0.9)
    again = model.sample(CAPTIONS, n=3, seed=5, temperature=0.9)
    for a, b in zip(drawn, again):
        np.testing.assert_array_equal(a.images, b.images)
        assert a.images.shape == (3, 60, 60, 3) and a.ids.shape == (3, 10, 10)
    alone = model.sample(CAPTIONS[1:2], n=3, seed=5, temperature=0.9, batch=1)
    np.testing.assert_array_equal(alone[0].ids, drawn[1].ids)
    np.testing.assert_allclose(alone[0].logp, drawn[1].logp, rtol=1e-4)
    other = model.sample(CAPTIONS[:1], n=3, seed=6, temperature=0.9)
    assert (other[0].ids != drawn[0].ids).any()


def test_pictures_are_the_decoded_tokens_and_scores_those_of_clip(model):
    drawn = model.sample(CAPTIONS[:1], n=4, seed=0)[0]
    np.testing.assert_array_equal(drawn.images, model.decode(drawn.ids))
    np.testing.assert_allclose(drawn.scores, model.score(CAPTIONS[:1] * 4, drawn.images), rtol=1e-4)
    assert drawn.scores[drawn.order()[0]] == drawn.scores.max()
    plain = dalle_jax.load(model.run.path).sample(CAPTIONS[:1], n=4, seed=0)[0]
    assert plain.scores is None
    np.testing.assert_array_equal(plain.order(), np.argsort(-drawn.logp, kind='stable'))


def test_log_likelihood_is_that_of_a_full_pass(model):
    drawn = model.sample(CAPTIONS, n=2, seed=1, temperature=0.5, top_k=8)
    text, _ = generate.encode_captions(model.run.tokenizer, CAPTIONS,
                                       model.run.config.text_length - 1)
    likelihood = jax.jit(model.run.module.likelihood, static_argnums=1)
    for row, one in zip(text, drawn):
        _, logp = likelihood(model.run.params, model.run.config, np.repeat(row[None], 2, 0),
                             one.ids)
        np.testing.assert_allclose(one.logp, logp, rtol=1e-4)


def test_encode_and_decode(model):
    images = Scenes(SceneConfig(), 'any', 4).images(np.arange(4))
    ids = model.encode(images)
    assert ids.shape == (4, 10, 10) and ids.max() < 64
    assert model.decode(ids).dtype == np.uint8
    with pytest.raises(ValueError, match=r'float64 \[4, 60, 60, 3\]; expected uint8 .*60, 60, 3'):
        model.encode(images / 255)
    with pytest.raises(ValueError, match=r'values in \[0, 64\)'):
        model.decode(ids + 64)


def test_captions_that_cannot_be_drawn_are_named(model):
    with pytest.raises(ValueError, match="caption 1 is empty"):
        model.sample(['a red circle', '  '])
    with pytest.raises(ValueError, match='give a list of captions'):
        model.sample('a red circle')
    with pytest.raises(ValueError, match='there are no captions'):
        model.sample([])
    with pytest.raises(ValueError, match='temperature is -1'):
        model.sample(CAPTIONS, temperature=-1)
    long = ' '.join(['large red star'] * 50)
    assert model.sample([long])[0].truncated


def test_a_run_does_what_it_can_and_says_what_it_cannot(trained):
    dvae = dalle_jax.load(trained / 'dvae')
    with pytest.raises(ValueError, match='is a dvae run, which cannot sample; load a DALL-E run'):
        dvae.sample(CAPTIONS)
    with pytest.raises(ValueError, match='is a clip run, which cannot encode images'):
        dalle_jax.load(trained / 'clip').encode(np.zeros((1, 60, 60, 3), np.uint8))


def test_sample_writes_images_grid_and_lines(model, tmp_path):
    sample.run(model, CAPTIONS, generate.Sampling(candidates=4, seed=3), 2, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines()]
    assert [(line['caption'], line['rank']) for line in lines] == [
        (caption, rank) for caption in CAPTIONS for rank in range(2)]
    drawn = model.sample(CAPTIONS, n=4, seed=3)
    for line in lines:
        expected = drawn[CAPTIONS.index(line['caption'])]
        assert line['index'] == expected.order()[line['rank']]
        picture = np.asarray(Image.open(tmp_path / line['file']))
        np.testing.assert_array_equal(picture, expected.images[line['index']])
    assert Image.open(tmp_path / 'grid.png').size == (2 * 62 + 2, 3 * 62 + 2)


def test_wrong_kinds_of_runs_are_refused_by_name(trained, tmp_path):
    with pytest.raises(runs.RunError, match='dvae is a dvae run; name a CLIP run'):
        dalle_jax.load(trained / 'dalle', clip=trained / 'dvae')
    with pytest.raises(runs.RunError, match="clip' is a clip run; name an image"):
        train.run(config_lib.load(f"experiments/dalle.py:scenes,dvae={trained / 'clip'}"),
                  tmp_path / 'run')
    with pytest.raises(runs.RunError, match='name a finished dVAE run with --config.frozen.image'):
        train.run(config_lib.load('experiments/dalle.py:scenes,dvae='), tmp_path / 'run')
    with pytest.raises(runs.RunError, match='dvae run; give a DALL-E run, which can draw'):
        evaluate.run(config_lib.load(
            f"experiments/evaluate.py:scenes,run={trained / 'dvae'},clip={trained / 'clip'}"),
            tmp_path / 'eval')
    assert not (tmp_path / 'run').exists() and not (tmp_path / 'eval').exists()


def test_evaluation_writes_all_keys_and_continues(trained, tmp_path, capsys):
    config = config_lib.load(
        f"experiments/evaluate.py:scenes,run={trained / 'dalle'},clip={trained / 'clip'}",
        {'captions': 6, 'candidates': 8, 'reconstructions': 12, 'lookup_images': 64, 'batch': 16,
         'features': ''})
    result = evaluate.run(config, tmp_path / 'eval')
    wanted = ('caption_accuracy_1 caption_accuracy_8 pair_accuracy_1 pair_accuracy_8 '
              'reconstruction_accuracy reconstruction_psnr lookup_accuracy lookup_psnr '
              'codebook_used codebook_perplexity caption_text_nats_per_token '
              'caption_image_nats_per_token caption_clip_score caption_colour '
              'caption_shape caption_size caption_relation caption_background caption_count')
    assert set(wanted.split()) <= set(scenes_page.flat(result))
    assert json.loads((tmp_path / 'eval' / 'result.json').read_text()) == result
    page = (tmp_path / 'eval' / 'report.html').read_text()
    assert 'never trained on' in page and not re.search(r'(src|href)="?http', page)
    capsys.readouterr()
    again = evaluate.run(config, tmp_path / 'eval')
    assert again == result and 'images/s' not in capsys.readouterr().out  # nothing drawn again
    without = json.loads((tmp_path / 'eval' / 'result.json').read_text())
    del without['results']['tokenizer']
    (tmp_path / 'eval' / 'result.json').write_text(json.dumps(without))
    evaluate.write_report(tmp_path / 'eval', tmp_path / 'without.html')
    assert 'lookup of pixel squares' in page
    assert 'lookup of pixel squares' not in (tmp_path / 'without.html').read_text()
    with pytest.raises(runs.RunError, match='evaluation with other settings, .*: temperature was'):
        config.unlock()
        config.temperature = 0.5
        evaluate.run(config, tmp_path / 'eval')


def photos(path):
    """A folder as a user would have it: nested, mixed formats, several captions, odd files."""
    images = Scenes(SceneConfig(size=80), 'any', 24)
    for i in range(24):
        folder = path / ('a', 'b/c')[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ('png', 'JPG', 'jpeg', 'webp')[i % 4]
        Image.fromarray(images[i].image[:, :76]).save(folder / f'{i}.{suffix}')
        (folder / f'{i}.txt').write_text(f'{images.caption(i)}\n\nAnother line, no. {i}\n')
    (path / 'a' / 'uncaptioned.png').write_bytes((path / 'a' / '0.png').read_bytes())
    (path / 'a' / 'broken.jpg').write_bytes(b'nothing')
    (path / 'a' / 'broken.txt').write_text('a broken picture')
    Image.new('RGB', (8, 8)).save(path / 'a' / 'tiny.png')
    (path / 'a' / 'tiny.txt').write_text('a tiny picture')
    return path


def test_own_images_from_training_to_samples(tmp_path, capsys):
    folder = photos(tmp_path / 'photos')
    facts = train.run(config_lib.load(
        f'experiments/dvae.py:folder,path={folder},steps=20,batch=8',
        QUICK | SMALL_DVAE | {'data.crop': 'stage1'}), tmp_path / 'dvae')
    assert facts['bad_records'] > 0
    train.run(config_lib.load(
        f"experiments/dalle.py:folder,path={folder},dvae={tmp_path / 'dvae'},steps=20,batch=8",
        QUICK | SMALL_DALLE), tmp_path / 'dalle')
    printed = capsys.readouterr().out
    assert all(what in printed for what in ('broken.jpg', 'uncaptioned.png', 'tiny.png', '8 x 8'))
    model = dalle_jax.load(tmp_path / 'dalle')
    assert model.run.config.grid == (8, 8)
    drawn = model.sample(['a picture with a caption of mine'], n=2)[0]
    assert drawn.images.shape == (2, 64, 64, 3)


@pytest.mark.slow
def test_a_prepared_tfds_directory_trains(tmp_path):
    from dalle_jax.data.tfds import build_scenes
    directory = build_scenes(tmp_path / 'tfds', SceneConfig(), {'train': 32, 'combos': 8})
    facts = train.run(config_lib.load(
        f'experiments/dvae.py:folder,source=tfds,path={directory},size=48,steps=20,batch=8',
        QUICK | SMALL_DVAE | {'data.valid_split': 'combos'}), tmp_path / 'dvae')
    assert facts['step'] == 20 and facts['bad_records'] == 0


def test_runs_that_were_moved_together_find_each_other(trained, tmp_path, monkeypatch):
    moved = tmp_path / 'moved'
    shutil.copytree(trained, moved)
    config = json.loads((moved / 'dalle' / 'config.json').read_text())
    config['frozen']['image'] = 'a/place/that/is/gone/dvae'
    (moved / 'dalle' / 'config.json').write_text(json.dumps(config))
    assert dalle_jax.load(moved / 'dalle').image_run.path == moved / 'dvae'
    shutil.rmtree(moved / 'dvae')
    with pytest.raises(runs.RunError, match='gone/dvae is not a run'):
        dalle_jax.load(moved / 'dalle')


def test_a_damaged_run_is_refused_by_name(trained, tmp_path):
    shutil.copytree(trained / 'dvae', tmp_path / 'dvae')
    for file in (tmp_path / 'dvae' / 'checkpoints').rglob('d/*'):
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match='no usable checkpoint in .*dvae'):
        dalle_jax.load(tmp_path / 'dvae')
    shutil.rmtree(tmp_path / 'dvae' / 'checkpoints')
    with pytest.raises(CheckpointError, match='there are no checkpoints'):
        dalle_jax.load(tmp_path / 'dvae')


# -- export ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    """A DALL-E run with its image tokenizer and a CLIP run, exported and then moved."""
    root = tmp_path_factory.mktemp('exported')
    export.run(trained / 'dalle', root / 'first')
    export.run(trained / 'clip', root / 'first')
    return (root / 'first').rename(root / 'moved')


def test_an_exported_run_draws_the_same_images(trained, exported, model):
    assert sorted(p.name for p in exported.iterdir()) == ['clip', 'dalle', 'dvae']
    again = dalle_jax.load(exported / 'dalle', clip=exported / 'clip')
    assert again.image_run.path == exported.resolve() / 'dvae'
    assert again.fingerprints == model.fingerprints
    for a, b in zip(model.sample(CAPTIONS, n=2, seed=3), again.sample(CAPTIONS, n=2, seed=3)):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.scores, b.scores)


def test_exporting_says_nothing_of_checkpoints(trained, tmp_path, capfd):
    logging.set_verbosity(logging.INFO)
    export.run(trained / 'clip', tmp_path)
    told = capfd.readouterr()
    assert told.err == '' and len(told.out.splitlines()) == 1


def test_a_card_tells_what_it_is(exported):
    card = (exported / 'dalle' / 'README.md').read_text()
    parameters = json.loads((exported / 'dalle' / 'done.json').read_text())['parameters']
    assert f'`dalle` of {parameters:,} parameters' in card and '`../dvae`' in card
    assert '| width | 32 |' in card and 'step 20' in card


def test_an_exported_run_stays_as_it_is(trained, exported, tmp_path):
    """Nothing is trained into it, and a changed byte of its weights is noticed."""
    shutil.copytree(exported / 'dvae', tmp_path / 'dvae')
    config = (tmp_path / 'dvae' / 'config.json').read_text()
    with pytest.raises(runs.RunError, match='is an exported run, which stays as it is'):
        train.run(config_lib.load('experiments/dvae.py:scenes'), tmp_path / 'dvae')
    assert (tmp_path / 'dvae' / 'config.json').read_text() == config
    weights = tmp_path / 'dvae' / 'model.safetensors'
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(runs.RunError, match='has changed since it was exported'):
        runs.load(tmp_path / 'dvae')


def test_two_share_an_image_tokenizer(trained, exported, tmp_path, capsys):
    shutil.copytree(exported / 'dvae', tmp_path / 'dvae')
    export.run(trained / 'dalle', tmp_path)
    assert 'dvae is there already' in capsys.readouterr().out
    assert dalle_jax.load(tmp_path / 'dalle').image_run.path == tmp_path.resolve() / 'dvae'


def test_exports_that_cannot_be(trained, exported, tmp_path):
    with pytest.raises(runs.RunError, match='dvae exists; remove it or give another --out'):
        export.run(trained / 'dvae', exported)
    with pytest.raises(runs.RunError, match='nowhere is not a run'):
        export.run(trained / 'nowhere', tmp_path)
    copy = tmp_path / 'copy'
    shutil.copytree(exported, copy)
    weights = copy / 'dalle' / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match='model.safetensors'):
        dalle_jax.load(copy / 'dalle')
    shutil.copyfile(copy / 'dvae' / 'model.safetensors', weights)
    with pytest.raises(runs.RunError, match='of different models: .* arrays differ, the first is'):
        dalle_jax.load(copy / 'dalle')
