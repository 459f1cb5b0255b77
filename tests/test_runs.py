import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import config, runs
from dalle_jax.evaluation.config import EvaluateConfig
from dalle_jax.interop import files
from dalle_jax.models import layers
from dalle_jax.report import read_metrics
from experiments import common


def experiment(**overrides):
    return config.resolve(config.load('experiments/dvae.py:scenes',
                                      {k.replace('__', '.'): v for k, v in overrides.items()}))


def test_another_experiment_is_refused_by_name(tmp_path):
    runs.Run(tmp_path / 'run', experiment()).close()
    runs.Run(tmp_path / 'run', experiment(optimizer__b1=0.5)).close()  # nothing is saved yet
    runs.Run(tmp_path / 'run', experiment()).close()
    (tmp_path / 'run' / 'checkpoints' / '10').mkdir(parents=True)
    with pytest.raises(runs.RunError, match='optimizer.peak_lr was .* and is now 1.0.*--workdir'):
        runs.Run(tmp_path / 'run', experiment(optimizer__peak_lr=1.0))
    runs.Run(tmp_path / 'run', experiment(loop__log_every=10)).close()  # harmless: continues


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / 'photo.jpg').write_text('')
    with pytest.raises(runs.RunError, match='not empty .it holds photo.jpg.*another --workdir'):
        runs.Run(tmp_path, experiment())


def test_one_process_at_a_time(tmp_path):
    code = ('import sys\n'
            'from dalle_jax import config, runs\n'
            'try:\n'
            "  runs.Run(sys.argv[1], config.resolve(config.load('experiments/dvae.py:scenes')))\n"
            'except runs.RunError as error:\n'
            "  print('refused:', error)\n")

    def other():
        return subprocess.run([sys.executable, '-c', code, tmp_path / 'run'], capture_output=True,
                              text=True).stdout

    run = runs.Run(tmp_path / 'run', experiment())
    assert 'refused' in other() and 'in use by another process' in other()
    run.close()
    assert other() == ''


def test_metrics_of_a_continued_run(tmp_path):
    run = runs.Run(tmp_path / 'run', experiment())
    run.start_log(0)
    for step in (10, 20, 30):
        run.log('train', step, {'loss': step / 10})
    run.close()
    path = tmp_path / 'run' / 'metrics.jsonl'
    path.write_text(path.read_text() + '{"kind": "train", "st')  # killed while writing
    before = read_metrics(path)
    assert [line['step'] for line in before] == [10, 20, 30]
    run = runs.Run(tmp_path / 'run', experiment())
    run.start_log(20)
    run.log('train', 30, {'loss': float('nan')})
    run.close()
    lines = read_metrics(path)
    assert [(line['step'], line['loss']) for line in lines[:2]] == [(10, 1.0), (20, 2.0)]
    assert lines[2]['step'] == 30 and np.isnan(lines[2]['loss'])
    assert lines[2]['time'] >= before[1]['time']


@pytest.mark.parametrize('content,message', [
    (None, 'is not a run: it has no config.json'),
    ('{"model": "dvae", ', 'cannot be read'),
    (json.dumps({'model': 'dvae', 'colour': 1}), 'unknown key'),
])
def test_loading_what_is_no_run(tmp_path, content, message):
    if content:
        (tmp_path / 'config.json').write_text(content)
    with pytest.raises(runs.RunError, match=message):
        runs.load(tmp_path)


def test_an_unfinished_run_is_not_loaded(tmp_path):
    runs.Run(tmp_path / 'run', experiment()).close()
    with pytest.raises(runs.RunError, match='has not finished training; run its train command'):
        runs.load(tmp_path / 'run')


# -- errors of verbs -------------------------------------------------------------------------------


@pytest.mark.parametrize('main,told', [
    (lambda argv: runs.read_config('nowhere'), 'verb: nowhere is not a run'),
    (lambda argv: files.read('nowhere'), 'verb: nowhere: no such file'),
    (lambda argv: EvaluateConfig(), "verb: run is ''; it must be"),
    (lambda argv: common.parse_arg('x', 'y'), "verb: unknown variant 'x'"),
    (lambda argv: Path('nowhere').read_text(), 'verb: [Errno 2] No such file'),
], ids=['own', 'os', 'value', 'experiment', 'elsewhere'])
def test_wrong_input_is_a_line(main, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['somewhere/verb.py'])
    with pytest.raises(SystemExit) as end:
        runs.start(main)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.startswith(told) and 'Traceback' not in errors


def elsewhere(argv):
    raise ValueError('not raised in the package')


@pytest.mark.parametrize('main,error', [
    (elsewhere, ValueError),
    (lambda argv: int('x'), ValueError),
    (lambda argv: {}['x'], KeyError),
    # Raised by jax, which cuts its own part off the traceback.
    (lambda argv: layers.contract('a,a->', jnp.zeros(3), jnp.zeros(4), jnp.float32), ValueError),
], ids=['elsewhere', 'python', 'key', 'jax'])
def test_other_errors_keep_their_traceback(main, error, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['somewhere/verb.py'])
    with pytest.raises(error):
        runs.start(main)


def test_a_misspelt_key_is_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'dalle_jax.evaluate', '--config', 'experiments/evaluate.py:scenes',
         '--config.blr=3', '--workdir', str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('evaluate: ')
    assert 'Did you mean "blur"' in done.stderr and 'Traceback' not in done.stderr
