"""Training as its user runs it: killed at any moment and continued, on damaged and odd input."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dalle_jax import config as config_lib
from dalle_jax import runs, train
from dalle_jax.models import dvae
from dalle_jax.report import read_metrics

TINY = {'arch.widths': (8, 8), 'arch.vocab': 16, 'arch.n_init': 8, 'arch.blocks_per_group': 1,
        'data.train_length': 4096, 'data.valid_length': 16, 'loop.group': 2, 'loop.log_every': 2,
        'loop.snapshot_every': 0, 'loop.valid_every': 20, 'loop.save_every': 20,
        'loop.prng': 'threefry2x32'}


def flags(values):
    return [f'--config.{key}={value}' for key, value in values.items()]


def experiment(spec, **overrides):
    return config_lib.load(spec, TINY | {k.replace('__', '.'): v for k, v in overrides.items()})


def losses(workdir):
    return {line['step']: line['loss'] for line in read_metrics(workdir / 'metrics.jsonl')
            if line['kind'] == 'train'}


def test_killed_and_continued_equals_uninterrupted(tmp_path):
    """kill -9 at two moments, one of them probably in the middle of a save."""
    # Saves fall between the steps at which losses are logged.
    values = TINY | {'loop.save_every': 4, 'loop.log_every': 6}
    command = [sys.executable, '-m', 'dalle_jax.train',
               '--config=experiments/dvae.py:scenes,steps=40,batch=4', *flags(values)]

    def start(name):
        return subprocess.Popen([*command, f'--workdir={tmp_path / name}'],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    whole = start('whole')
    output = whole.communicate(timeout=300)[0].decode()
    assert whole.returncode == 0, output
    for kill_after in (3, 11):  # lines of metrics, so before and after the codebook's k-means
        process = start('killed')
        metrics = tmp_path / 'killed' / 'metrics.jsonl'
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate()
    process = start('killed')
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    expected, found = losses(tmp_path / 'whole'), losses(tmp_path / 'killed')
    assert sorted(expected) == sorted({*range(4, 41, 4), *range(6, 41, 6)})
    assert found == expected  # to the last bit
    done = [json.loads((tmp_path / name / 'done.json').read_text()) for name in ('whole', 'killed')]
    assert done[0]['psnr_hard'] == done[1]['psnr_hard']


def folder(path, count=12, side=48):
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 255, (side, side + 4, 3), np.uint8))
        image.save(path / f'{i}.{("png", "jpg", "webp")[i % 3]}')
        (path / f'{i}.txt').write_text(f'a picture number {i}\nanother line about {i}\n')
    return path


def test_a_folder_with_bad_files_trains_and_names_them(tmp_path, capsys):
    images = folder(tmp_path / 'images')
    (images / 'broken.png').write_bytes(b'not an image')
    Image.new('RGB', (8, 8)).save(images / 'tiny.png')
    facts = train.run(
        experiment(f'experiments/dvae.py:folder,path={images},size=32,steps=20,batch=4',
                   data__crop='stage1'), tmp_path / 'run')
    printed = capsys.readouterr().out
    assert facts['bad_records'] > 0
    assert 'broken.png' in printed and 'tiny.png' in printed and '8 x 8' in printed, printed
    run = runs.load(tmp_path / 'run')
    assert run.step == 20
    logged = read_metrics(tmp_path / 'run' / 'metrics.jsonl')[-2]  # the last is of kind 'valid'
    assert logged['model_tflops'] == pytest.approx(
        3 * dvae.flops(run.config) * logged['examples_per_s'] / 1e12)
    assert logged['mfu'] > 0 and f"TFLOP/s  MFU {logged['mfu']:.1%}" in printed


def test_an_empty_folder_is_refused_before_anything_starts(tmp_path):
    (tmp_path / 'images').mkdir()
    with pytest.raises(ValueError, match='images.*0 images.*expected images'):
        train.run(experiment(f"experiments/dvae.py:folder,path={tmp_path / 'images'},steps=20"),
                  tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_finished_run_is_not_trained_again_and_seeds_another(tmp_path, capsys):
    spec = 'experiments/dvae.py:scenes,steps=20,batch=4'
    first = train.run(experiment(spec), tmp_path / 'first')
    assert train.run(experiment(spec), tmp_path / 'first') is None
    loaded = runs.load(tmp_path / 'first')
    assert loaded.experiment.arch.vocab == 16 and first['step'] == loaded.step == 20
    capsys.readouterr()
    train.run(experiment(spec, arch__vocab=32, init_from=str(tmp_path / 'first')),
              tmp_path / 'second')
    printed = capsys.readouterr().out
    assert 'of another shape: codebook/kernel' in printed and 'encoder/logits/kernel' in printed


def test_terminated_run_saves_and_says_so(tmp_path):
    command = [sys.executable, '-m', 'dalle_jax.train', f'--workdir={tmp_path / "run"}',
               '--config=experiments/dvae.py:scenes,steps=2000,batch=4', *flags(TINY)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / 'run' / 'metrics.jsonl').exists():
        assert process.poll() is None
        time.sleep(0.05)
    for line in process.stdout:
        if 'step ' in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143
    assert 'stopped by a signal' in rest and 'the same command continues' in rest
    steps = list(losses(tmp_path / 'run'))
    saved = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]*')]
    assert max(saved) >= steps[-1]
