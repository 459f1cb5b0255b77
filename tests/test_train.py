"""Training as its user runs it: killed at any moment and continued, on damaged and odd input."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dalle_jax import config as config_lib
from dalle_jax import export, runs, train
from dalle_jax.models import dvae
from dalle_jax.report import read_metrics

TINY = {'arch.widths': (8, 8), 'arch.vocab': 16, 'arch.n_init': 8, 'arch.blocks_per_group': 1,
        'data.train_length': 4096, 'data.valid_length': 16, 'loop.group': 2, 'loop.log_every': 2,
        'loop.snapshot_every': 0, 'loop.valid_every': 20, 'loop.save_every': 20,
        'loop.prng': 'threefry2x32'}


def flags(values):
    return [f'--config.{key}={value}' for key, value in values.items()]


def losses(workdir):
    return {line['step']: line['loss'] for line in read_metrics(workdir / 'metrics.jsonl')
            if line['kind'] == 'train'}


# Saves fall between the steps at which losses are logged.
SPEC, OFTEN = 'experiments/dvae.py:scenes,steps=24,batch=4', {'loop.save_every': 4,
                                                              'loop.log_every': 6}


def start(workdir):
    return subprocess.Popen(
        [sys.executable, '-m', 'dalle_jax.train', f'--config={SPEC}', *flags(TINY | OFTEN),
         f'--workdir={workdir}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that nothing has interrupted."""
    path = tmp_path_factory.mktemp('runs') / 'whole'
    process = start(path)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    return path


def test_killed_and_continued_equals_uninterrupted(whole, tmp_path):
    """kill -9 at two moments, one of them probably in the middle of a save."""
    killed = tmp_path / 'killed'
    for kill_after in (3, 8):  # lines of metrics, so before and after the codebook's k-means
        process = start(killed)
        metrics = killed / 'metrics.jsonl'
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate()
    process = start(killed)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    expected, found = losses(whole), losses(killed)
    assert sorted(expected) == sorted({*range(4, 25, 4), *range(6, 25, 6)})
    assert found == expected  # to the last bit
    done = [json.loads((path / 'done.json').read_text()) for path in (whole, killed)]
    assert done[0]['psnr_hard'] == done[1]['psnr_hard']


def test_an_empty_folder_is_refused_before_anything_starts(tmp_path):
    (tmp_path / 'images').mkdir()
    with pytest.raises(ValueError, match='images.*0 images.*expected images'):
        train.run(config_lib.load(
            f"experiments/dvae.py:folder,path={tmp_path / 'images'},steps=20", TINY),
            tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_finished_run_is_not_trained_again_and_seeds_another(whole, tmp_path, capsys):
    assert train.run(config_lib.load(SPEC, TINY | OFTEN), whole) is None
    loaded = runs.load(whole)
    assert loaded.experiment.arch.vocab == 16 and loaded.step == 24
    logged = read_metrics(whole / 'metrics.jsonl')[-2]  # the last is of kind 'valid'
    trained_on = dataclasses.replace(loaded.config, image_size=36)  # windows of the images
    assert logged['model_tflops'] == pytest.approx(
        3 * dvae.flops(trained_on) * logged['examples_per_s'] / 1e12)
    assert logged['mfu'] > 0
    capsys.readouterr()
    train.run(config_lib.load(SPEC, TINY | {'arch.vocab': 32, 'init_from': str(whole)}),
              tmp_path / 'second')
    printed = capsys.readouterr().out
    assert 'of another shape: codebook/kernel' in printed and 'encoder/logits/kernel' in printed
    assert 'TFLOP/s  MFU ' in printed
    of_run, of_export = train.donated(whole), train.donated(export.run(whole, tmp_path))
    assert of_run.keys() == of_export.keys() and len(of_run) > 10
    for name, array in of_run.items():
        np.testing.assert_array_equal(array, of_export[name])


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
