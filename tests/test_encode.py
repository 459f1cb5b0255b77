"""Token records are the tokenizer's codes of the very crops, and train like the images."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from PIL import Image

import dalle_jax
from dalle_jax import config as config_lib
from dalle_jax import encode, machine, runs, train
from dalle_jax.data import images, sources, tokens
from dalle_jax.data.records import BadRecord
from dalle_jax.models import dalle, dvae
from dalle_jax.report import read_metrics
from dalle_jax.training.checkpoint import Checkpoints

SIDE = 32
SMALL_DALLE = {'arch.width': 32, 'arch.heads': 2, 'arch.depth': 1, 'arch.text_length': 12,
               'arch.attention': 'dense', 'text_vocab': 80, 'optimizer.name': 'adamw',
               'optimizer.average_decay': 0.0, 'loop.log_every': 1,
               'loop.valid_batches': 1, 'loop.save_every': 4, 'loop.snapshot_every': 0,
               'loop.valid_every': 0}


@functools.partial(jax.jit, static_argnums=0)
def varied(config, key):
    """Initial parameters, the logits shifted to mean zero, so that no code wins everywhere."""
    params, _ = dvae.init(config, key)
    noise = jax.random.randint(key, (4, SIDE, SIDE, 3), 0, 256).astype('uint8')
    logits = dvae._encode(params, config, noise, 'float32')[1]
    params['encoder']['logits']['bias'] -= logits.mean((0, 1, 2))
    return params


def finished_dvae(path, seed):
    """A run as training leaves it, of random parameters; their codes differ from patch to patch."""
    experiment = config_lib.resolve(config_lib.load(
        f'experiments/dvae.py:folder,path=X,size={SIDE},steps=10',
        {'arch.widths': (8, 16), 'arch.blocks_per_group': 1, 'arch.n_init': 8, 'arch.vocab': 64}))
    # rbg keys compile in less time.
    params = jax.device_get(varied(experiment.arch, jax.random.key(seed, impl='rbg')))
    path.mkdir(parents=True)
    checkpoints = Checkpoints(path / 'checkpoints')
    checkpoints.save(10, {'params': params})
    checkpoints.close()
    runs.write_atomic(path / 'config.json', config_lib.to_json(experiment))
    runs.write_atomic(path / 'done.json', '{"step": 10}')
    return path


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp('runs')
    return [finished_dvae(root / f'dvae{seed}', seed) for seed in range(2)]


def photos(path, count, side, bad=False):
    """Images with captions, of which some cannot be used if `bad`."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = path / ('a', 'b/ç')[i % 2] / f'{i}.{("png", "webp")[i % 2]}'
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(file, lossless=True)
        file.with_suffix('.txt').write_text(f'a picture number {i}\n\nкартинка № {i} 🎨\n')
    if bad:
        (path / 'a' / 'broken.png').write_bytes(b'nothing')
        Image.new('RGB', (8, 50)).save(path / 'a' / 'tiny.png')
        Image.new('RGB', (99, 99)).save(path / 'b' / 'uncaptioned.png')
        for name in ('broken', 'tiny'):
            (path / 'a' / f'{name}.txt').write_text('a caption')
    return path


def experiment(path, source='folder', dvae_run='', steps=4, **overrides):
    return config_lib.load(
        f'experiments/dalle.py:folder,source={source},path={path},dvae={dvae_run},steps={steps},'
        'batch=4', SMALL_DALLE | {k.replace('__', '.'): v for k, v in overrides.items()})


@pytest.fixture(scope='module')
def messy(tmp_path_factory):
    return photos(tmp_path_factory.mktemp('messy'), 37, 44, bad=True)


@pytest.fixture(scope='module')
def encoded(tokenizers, messy, tmp_path_factory):
    """Two crops of each image of a folder with bad files, in shards of 8, five images at once."""
    out = tmp_path_factory.mktemp('encoded') / 'tokens'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, 'SHARD', 8)
        meta = encode.run(experiment(messy, seed=3), tokenizers[0], out, crops=2, batch=5)
    return out, meta


def good_records(source):
    for index in range(len(source)):
        try:
            record = source[index]
            yield index, record, images.decode(record.image, record.name)
        except BadRecord:
            continue


def test_codes_are_those_of_the_very_crops(tokenizers, messy, encoded):
    out, meta = encoded
    run = runs.load(tokenizers[0])
    data = config_lib.resolve(experiment(messy)).data
    assert (data.crop, data.valid_crop) == ('stage2', 'center')
    for split, crops in (('train', 2), ('valid', 1)):
        records, wanted = [], []
        for index, record, image in good_records(sources.open_source(data, split)):
            if min(image.shape[:2]) < SIDE:
                continue
            records.append(record)
            wanted += [images.crop('stage2', image, SIDE, np.random.default_rng((3, index, k)))
                       if split == 'train' else images.crop_center(image, SIDE)
                       for k in range(crops)]
        codes = np.asarray(dvae.encode(run.params, run.config, np.stack(wanted)))
        codes = codes.reshape(-1, crops, *run.config.grid)
        source = tokens.TokenSource(out, split)
        assert len(source) == len(records) == meta['splits'][split]['records'] > 6
        for i, record in enumerate(records):
            assert source[i][:3] == (None, record.captions, record.name)
            np.testing.assert_array_equal(source[i].codes, codes[i])
        assert len(np.unique(codes)) > 4  # else the comparison says nothing
    assert any('🎨' in caption for caption in source.captions(0))
    assert (codes[:, 0] != codes[:1, 0]).any()


def test_meta_says_what_the_codes_are(tokenizers, encoded):
    _, meta = encoded
    run = runs.load(tokenizers[0])
    assert meta['tokenizer'] == {
        'run': str(tokenizers[0]), 'fingerprint': runs.fingerprint(run.params), 'step': 10,
        'grid': [*run.config.grid], 'vocab': 64, 'image_size': SIDE}
    assert meta['settings']['dtype'] == 'float32' and meta['settings']['data.crop'] == 'stage2'
    assert (meta['settings']['crops'], meta['settings']['seed']) == (2, 3)


def test_bad_records_are_left_out_counted_and_named(encoded, messy, tokenizers, tmp_path, capsys):
    out, meta = encoded
    named = ''.join((out / split / 'left_out.txt').read_text() for split in ('train', 'valid'))
    assert sum(meta['splits'][split]['left_out'] for split in ('train', 'valid')) == 3
    for reason in ('a/broken.png: no image file', 'a/tiny.png: 8 x 50 pixels',
                   'b/uncaptioned.png: no captions'):
        assert reason in named
    os.makedirs(tmp_path / 'only')
    for name in ('broken', 'tiny'):
        for suffix in ('.png', '.txt'):
            shutil.copy(messy / 'a' / (name + suffix), tmp_path / 'only')
    with pytest.raises(ValueError, match="all 1 records of split 'train' are bad; .*: .*png"):
        encode.run(experiment(tmp_path / 'only'), tokenizers[0], tmp_path / 'out')
    assert 'left out' in capsys.readouterr().out


KILLED = '''
    import os, signal, sys
    from dalle_jax import config, encode
    from dalle_jax.data import tokens
    encode.SHARD = 8
    write = tokens.write_shard
    def write_and_die(file, codes, lines, left_out):
        if file.name == 'train-000002.npz':
            file.with_name(file.name + '.tmp').write_bytes(b'half of it')
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, codes, lines, left_out)
    tokens.write_shard = write_and_die
    overrides = {'seed': 3, **eval(sys.argv[4])}
    encode.run(config.load(sys.argv[1], overrides), sys.argv[2], sys.argv[3], 2, 5)
'''


def files(directory):
    return {str(file.relative_to(directory)): file.read_bytes()
            for file in directory.rglob('*') if file.is_file()}


def test_killed_and_continued_equals_uninterrupted(tokenizers, messy, encoded, tmp_path,
                                                   monkeypatch):
    """kill -9 while a shard is written, a crash while they are joined, then to the end."""
    out = tmp_path / 'tokens'
    spec = f'experiments/dalle.py:folder,source=folder,path={messy},dvae=,steps=4,batch=4'
    killed = subprocess.run([sys.executable, '-c', textwrap.dedent(KILLED), spec, tokenizers[0],
                             out, repr(SMALL_DALLE)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = sorted(file.name for file in (out / 'parts').glob('*.npz'))
    assert done == ['train-000000.npz', 'train-000001.npz']
    with pytest.raises(FileNotFoundError, match='not finished: run its encode command again'):
        tokens.TokenSource(out, 'train')

    written, write = [], tokens.write_shard
    monkeypatch.setattr(encode, 'SHARD', 8)
    monkeypatch.setattr(tokens, 'write_shard',
                        lambda file, *args: written.append(file.name) or write(file, *args))
    with monkeypatch.context() as crash:
        crash.setattr(tokens, 'finish', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode.run(experiment(messy, seed=3), tokenizers[0], out, crops=2, batch=5)
    assert not set(written) & set(done) and 'train-000002.npz' in written
    written.clear()
    encode.run(experiment(messy, seed=3), tokenizers[0], out, crops=2, batch=5)
    assert not written and files(out) == files(encoded[0])

    before = files(out)
    assert encode.run(experiment(messy, seed=3), tokenizers[0], out, crops=2) == encoded[1]
    assert not written and files(out) == before


def test_a_directory_of_something_else_is_refused(tokenizers, messy, encoded, tmp_path):
    out = encoded[0]
    before = files(out)
    for change, run, crops, message in (
            (dict(seed=4), 0, 2, 'seed was 3 and is now 4'),
            (dict(seed=3), 0, 1, 'crops was 2 and is now 1'),
            (dict(seed=3), 1, 2, "tokenizer was '.{8}' and is now '"),
            (dict(seed=3, precision='bfloat16'), 0, 2, "dtype was 'float32' and is now 'bfloat16'"),
            (dict(seed=3, data__crop='stage1'), 0, 2, "data.crop was 'stage2' and is now 'stage1'"),
    ):
        with pytest.raises(runs.RunError, match=f'another kind: {message}.* another --out'):
            encode.run(experiment(messy, **change), tokenizers[run], out, crops=crops)
    other = photos(tmp_path / 'other', 12, SIDE)
    with pytest.raises(runs.RunError, match="data.path was .*messy.* and is now .*other.*images in "
                                            'train was .* and is now'):
        encode.run(experiment(other, seed=3), tokenizers[0], out, crops=2)
    with pytest.raises(runs.RunError, match='not empty .it holds a, b. and has no token records'):
        encode.run(experiment(messy), tokenizers[0], other)
    with runs.take(out, '--out'):
        with pytest.raises(runs.RunError, match='in use by another process; .* another --out'):
            encode.run(experiment(messy, seed=3), tokenizers[0], out, crops=2)
    assert files(out) == before and not (other / 'lock').exists()


def test_bad_arguments_are_named(tokenizers, messy, encoded, tmp_path):
    for spec, options, message in (
            (experiment(messy), {'crops': 0}, '--crops is 0; give at least 1'),
            (experiment(messy), {'batch': 0}, '--batch is 0; give at least 1'),
            (experiment(messy, data__crop='none'), {'crops': 2}, 'the same codes 2 times'),
            (experiment(messy, data__crop='window', data__image_size=16), {}, 'image_size is 16'),
            (experiment(encoded[0], 'tokens'), {}, 'holds token records already'),
            (experiment(tmp_path / 'gone'), {}, 'no directory'),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            encode.run(spec, tokenizers[0], tmp_path / 'out', **options)
    with pytest.raises(runs.RunError, match='gone is not a run'):
        encode.run(experiment(messy), tmp_path / 'gone', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# --- training on them -----------------------------------------------------------------------------

def losses(workdir):
    return {line['step']: line['loss'] for line in read_metrics(workdir / 'metrics.jsonl')}


@pytest.fixture(scope='module')
def trained(tokenizers, tmp_path_factory):
    """The same run on images through the tokenizer, and on token records without one."""
    root = tmp_path_factory.mktemp('trained')
    folder = photos(root / 'photos', 19, SIDE)
    whole = {'data__crop': 'none', 'data__valid_crop': 'none', 'seed': 5}
    encode.run(experiment(folder, **whole), tokenizers[0], root / 'tokens')
    with pytest.MonkeyPatch.context() as patch:
        # Nothing of it matters here, and it takes longer than all the rest.
        patch.setattr(dalle, 'snapshot', lambda *_: {})
        patch.setattr(machine, 'matmul_rate', lambda dtype: 1e9)
        train.run(experiment(folder, dvae_run=tokenizers[0], **whole), root / 'images')
        train.run(experiment(root / 'tokens', 'tokens', **whole), root / 'codes')
    return root, whole


def test_training_on_tokens_equals_training_on_images(tokenizers, trained):
    """Same order, captions, BPE dropout and codes: the same losses, in training and validation."""
    root, _ = trained
    expected, found = losses(root / 'images'), losses(root / 'codes')
    assert len(expected) == 4 and expected.keys() == found.keys()
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-6)
    stored = runs.read_config(root / 'codes')
    assert stored.arch == runs.read_config(root / 'images').arch
    assert stored.data.tokenizer == runs.fingerprint(runs.load(tokenizers[0]).params)
    assert stored.arch.image_vocab == 64 and stored.frozen['image'] == ''


def test_pictures_need_the_tokenizer_that_made_the_codes(tokenizers, trained, capsys):
    root, whole = trained
    with pytest.raises(runs.RunError, match='train command again with --config.frozen.image=RUN'):
        dalle_jax.load(root / 'codes')
    with pytest.raises(runs.RunError, match="dvae1' has the fingerprint .{8}, but the codes in .*"
                                            'tokens are those of .*dvae0 with'):
        train.run(experiment(root / 'tokens', 'tokens', tokenizers[1], **whole), root / 'codes')
    before = losses(root / 'codes')
    command = experiment(root / 'tokens', 'tokens', tokenizers[0], **whole)
    assert train.run(command, root / 'codes') is None and losses(root / 'codes') == before
    assert 'is finished' in capsys.readouterr().out
    assert dalle_jax.load(root / 'codes').image_run.path == tokenizers[0]


def test_a_run_is_not_continued_on_codes_of_another_tokenizer(trained):
    root, whole = trained
    shutil.copytree(root / 'tokens', root / 'other')
    meta = json.loads((root / 'other' / 'meta.json').read_text())
    meta['tokenizer']['fingerprint'] = '12345678'
    (root / 'other' / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(runs.RunError, match="data.tokenizer was .* and is now '12345678'"):
        train.run(experiment(root / 'other', 'tokens', **whole), root / 'codes')


def test_what_cannot_be_trained_on_tokens_says_so(trained, tmp_path):
    root, _ = trained
    for name, change in (('dvae', {}), ('clip', {'frozen.text': ''})):
        with pytest.raises(runs.RunError, match=f'the {name} is trained on images, and source'):
            train.run(config_lib.load(
                f"experiments/{name}.py:folder,source=tokens,path={root / 'tokens'}", change),
                tmp_path / 'run')
    with pytest.raises(runs.RunError, match='gone is not a run.*frozen.image for pictures only'):
        train.run(experiment(root / 'tokens', 'tokens', tmp_path / 'gone'), tmp_path / 'run')
    with pytest.raises(runs.RunError, match='is a dalle run; name an image tokenizer'):
        encode.run(experiment(root / 'photos'), root / 'codes', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
