"""From published files to runs that the rest of the package takes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dalle_jax
from dalle_jax import convert, export, runs, train
from dalle_jax.data.clip_text import ClipTokenizer
from dalle_jax.interop import clip as interop
from tests.interop.random_weights import random_weights

FIXTURES = Path(__file__).parent / 'interop' / 'fixtures'
CLIP = {'weights': str(FIXTURES / 'clip_huggingface.safetensors'),
        'tokenizer': str(FIXTURES / 'merges.txt')}
DVAE = {part: str(FIXTURES / f'dalle_{part}.pkl') for part in ('encoder', 'decoder')}


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('converted')
    convert.run('clip', CLIP, folder / 'clip')
    convert.run('dvae', DVAE, folder / 'dvae')
    return folder


def test_a_clip_scores_as_the_released_code(converted):
    """From captions and images to cosines: tokenizer, checkpoint and model together."""
    model, stored = dalle_jax.load(converted / 'clip'), np.load(FIXTURES / 'clip.npz')
    captions = [str(caption) for caption in stored['captions']]
    scale = np.exp(model.run.params['log_scale'])
    for shift in range(4):
        order = np.roll(np.arange(4), shift)
        np.testing.assert_allclose(
            scale * model.score(captions, stored['images'][order]),
            stored['logits'][order, np.arange(4)], atol=1e-4)
    assert type(model.run.tokenizer) is ClipTokenizer
    done = json.loads((converted / 'clip' / 'done.json').read_text())
    assert done['parameters'] == 60_609
    assert done['sources']['weights']['file'] == CLIP['weights']


def test_a_dvae_encodes_as_the_released_code(converted):
    model, stored = dalle_jax.load(converted / 'dvae'), np.load(FIXTURES / 'dvae.npz')
    small = np.tile(stored['images'][:, :16, :16], (1, 16, 16, 1))
    ids = model.encode(small)
    assert ids.shape == (3, 32, 32) and model.image_run.config.image_size == 256
    assert np.array_equal(model.decode(ids), model.decode(model.encode(small)))


@pytest.mark.slow
def test_a_vqgan_is_used_and_not_trained(tmp_path):
    stored = np.load(FIXTURES / 'vqgan.npz')
    np.savez(tmp_path / 'last.npz', **{
        f'state_dict.{name}': random_weights(name, shape)
        for name, shape in json.loads(str(stored['nearest_names'])).items()})
    convert.run('vqgan', {'weights': str(tmp_path / 'last.npz')}, tmp_path / 'vqgan')
    model = dalle_jax.load(tmp_path / 'vqgan')
    images = np.tile(stored['images'][:, :16, :16], (1, 16, 16, 1))
    ids = model.encode(images)
    assert ids.shape == (2, 64, 64) and len(np.unique(ids)) > 5
    assert model.decode(ids[:, :4, :4]).shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match='a vqgan is used with published weights'):
        train.run(model.run.experiment, tmp_path / 'train')


def test_the_same_command_again(converted, capsys):
    assert convert.run('clip', CLIP, converted / 'clip') is None
    assert 'is finished' in capsys.readouterr().out
    (converted / 'clip' / 'done.json').rename(converted / 'done')  # killed before its end
    try:
        assert convert.run('clip', CLIP, converted / 'clip')['parameters'] == 60_609
    finally:
        (converted / 'done').replace(converted / 'clip' / 'done.json')


def test_other_contents_are_refused(converted, tmp_path):
    with pytest.raises(runs.RunError, match='holds other weights; give another --out'):
        convert.run('dvae', DVAE, converted / 'clip')
    arrays = interop_arrays()
    arrays['logit_scale'] = arrays['logit_scale'] + np.float16(1)
    np.savez(tmp_path / 'other.npz', **arrays)
    shutil.copy(FIXTURES / 'config.json', tmp_path)
    with pytest.raises(runs.RunError, match='holds other weights; give another --out'):
        convert.run('clip', CLIP | {'weights': str(tmp_path / 'other.npz')}, converted / 'clip')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'photo.jpg').write_text('')
    with pytest.raises(runs.RunError, match='not empty'):
        convert.run('clip', CLIP, tmp_path / 'full')


def interop_arrays():
    from dalle_jax.interop import files

    return files.read(CLIP['weights'])


def test_bad_files_leave_nothing(tmp_path):
    def refused(message, kind, files, error=ValueError):
        with pytest.raises(error, match=message):
            convert.run(kind, files, tmp_path / 'out')
        assert not (tmp_path / 'out').exists()

    whole = Path(CLIP['weights']).read_bytes()
    (tmp_path / 'cut.safetensors').write_bytes(whole[:-100])
    refused('cut.safetensors: truncated', 'clip',
            CLIP | {'weights': str(tmp_path / 'cut.safetensors')})
    arrays = interop_arrays()
    arrays['text_projection.weight'] = np.full((20, 24), np.nan, np.float16)
    np.savez(tmp_path / 'nan.npz', **arrays)
    shutil.copy(FIXTURES / 'config.json', tmp_path)
    refused('nan.npz: text_projection.weight holds 480 values that are not finite', 'clip',
            CLIP | {'weights': str(tmp_path / 'nan.npz')})
    refused('no CLIP: visual.conv1.weight is missing', 'clip', CLIP | {'weights': DVAE['encoder']})
    refused("no encoder of OpenAI's dVAE", 'dvae', DVAE | {'encoder': CLIP['weights']})
    refused('no list of merges', 'clip', CLIP | {'tokenizer': str(FIXTURES / 'vocab.json')})
    refused('absent: no such file', 'dvae', DVAE | {'decoder': 'absent'}, FileNotFoundError)


@pytest.mark.parametrize('tower,change,message', [
    ('vision_config', {'hidden_act': 'gelu'}, "vision_config.hidden_act is 'gelu'"),
    ('text_config', {'layer_norm_eps': 1e-6}, 'text_config.layer_norm_eps is 1e-06'),
    ('text_config', {'num_attention_heads': 2}, 'heads {.*} wide'),
])
def test_other_arithmetic_is_refused(tmp_path, tower, change, message):
    """An activation does not show in the shapes, and the wrong one costs points silently."""
    described = json.loads((FIXTURES / 'config.json').read_text())
    assert interop.read_description(FIXTURES / 'config.json') == 8
    described[tower] |= change
    (tmp_path / 'config.json').write_text(json.dumps(described))
    with pytest.raises(ValueError, match=message):
        interop.read_description(tmp_path / 'config.json')


@pytest.mark.parametrize('text', ['{', '[]', '{"text_config": {"num_attention_heads": 0}}',
                                  '{"text_config": {"hidden_size": "x"}}',
                                  '{"text_config": {"hidden_size": 100}}'])
def test_descriptions_that_are_none(tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=r'config\.json is no description of a CLIP'):
        interop.read_description(tmp_path / 'config.json')


def test_another_model_does_not_touch_the_run(converted, tmp_path):
    shutil.copytree(converted / 'clip', tmp_path / 'clip')
    before = (tmp_path / 'clip' / 'config.json').read_text()
    other = tmp_path / 'other.txt'
    other.write_text(Path(CLIP['tokenizer']).read_text() + '\n')
    with pytest.raises(runs.RunError, match='holds other weights; give another --out'):
        convert.run('clip', CLIP | {'tokenizer': str(other)}, tmp_path / 'clip')
    assert (tmp_path / 'clip' / 'config.json').read_text() == before


def test_its_card_tells_where_it_is_from(converted, tmp_path):
    card = (export.run(converted / 'clip', tmp_path) / 'README.md').read_text()
    done = json.loads((tmp_path / 'clip' / 'done.json').read_text())
    assert 'converted from published weights' in card and 'trained with' not in card
    assert done['sources']['weights']['file'] == 'clip_huggingface.safetensors'
    assert done['sources']['weights']['sha256'] in card


def test_flags(tmp_path):
    def told(*flags):
        done = subprocess.run([sys.executable, '-m', 'dalle_jax.convert', *flags, '--out',
                               str(tmp_path / 'run')], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, text = told('--kind', 'dvae', '--encoder', DVAE['encoder'], '--weights', 'x')
    assert code and '--kind dvae needs --encoder and --decoder, and not the others' in text
    code, text = told('--kind', 'dvae', '--encoder', DVAE['encoder'], '--decoder', DVAE['decoder'])
    assert not code and '21,720 parameters' in text
    assert runs.load(tmp_path / 'run').config.vocab == 24
