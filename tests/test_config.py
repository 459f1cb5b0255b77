import dataclasses
import json
import subprocess
import sys

import pytest

from dalle_jax import config as lib


def load(spec='experiments/dvae.py:scenes', **overrides):
    return lib.resolve(lib.load(spec, {k.replace('__', '.'): v for k, v in overrides.items()}))


def test_argument_string_and_overrides():
    experiment = load('experiments/dvae.py:scenes,steps=40,batch=8', loop__group=2)
    assert experiment.loop.steps == 40
    assert experiment.data.batch_size == 8
    assert experiment.loop.group == 2
    assert isinstance(experiment.arch.widths, tuple)


def test_stored_config_is_the_same_experiment():
    experiment = load('experiments/dalle.py:scenes')
    again = lib.resolve(json.loads(lib.to_json(experiment)))
    assert again == experiment
    assert lib.differences(again, experiment) == {}


def test_differences_are_named():
    a, b = load(), load(optimizer__peak_lr=1.0)
    assert lib.differences(a, b) == {'optimizer.peak_lr': (a.optimizer.peak_lr, 1.0)}


@pytest.mark.parametrize('values,message', [
    ({'optimizer.peek_lr': 1.0}, r"unknown key optimizer.peek_lr; did you mean 'peak_lr'"),
    ({'optimiser.peak_lr': 1.0}, r"unknown key optimiser.peak_lr; did you mean 'optimizer'"),
])
def test_misspelt_override_names_the_nearest_key(values, message):
    with pytest.raises(lib.ConfigError, match=message):
        lib.load('experiments/dvae.py:scenes', values)


def test_misspelt_key_in_a_file_is_an_error_at_start(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text('from experiments import dvae\n'
                    'def get_config(arg=None):\n'
                    "  config = dvae.get_config('scenes')\n"
                    '  config.unlock()\n'
                    '  config.loop.log_evry = 10\n'
                    '  return config\n')
    with pytest.raises(lib.ConfigError, match=r"unknown key loop.log_evry; did you mean "
                                              r"'log_every'"):
        lib.resolve(lib.load(str(file)))


@pytest.mark.parametrize('spec,message', [
    ('experiments/dvea.py', 'no experiment file .*the experiments folder has: .*dvae.py'),
    ('experiments/dvae.py:scnes', "unknown variant 'scnes'; choose one of .*scenes"),
    ('experiments/dvae.py:scenes,stepz=3', "unknown argument 'stepz'; known: .*steps"),
])
def test_bad_experiment_argument(spec, message):
    with pytest.raises(ValueError, match=message):
        lib.load(spec)


def test_unknown_model_and_missing_key():
    with pytest.raises(lib.ConfigError, match='there is no module dalle_jax.models.gan'):
        lib.resolve({'model': 'gan'})
    with pytest.raises(lib.ConfigError, match='missing key data'):
        lib.resolve({'model': 'dvae'})


@pytest.mark.parametrize('change,message', [
    (dict(loop__group=7), r'loop.steps=1000 is not a multiple of loop.group=7'),
    (dict(loop__keep=1), 'keep at least 2'),
    (dict(loop__microbatches=5), r'loop.microbatches=5 does not divide data.batch_size'),
    (dict(precision='float8'), "precision is 'float8'"),
])
def test_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        load('experiments/dvae.py:scenes,steps=1000', **change)


def test_command_line_flag(tmp_path):
    """ml_collections' own flag, as the verbs use it, from a directory without experiments."""
    code = ('from absl import app\n'
            'from dalle_jax import config\n'
            'flag = config.define_flag()\n'
            'def main(_): print(config.resolve(flag.value).optimizer.peak_lr)\n'
            'app.run(main)\n')
    path = lib.EXPERIMENTS / 'dvae.py'

    def call(*arguments):
        return subprocess.run([sys.executable, '-c', code, f'--config={path}:scenes', *arguments],
                              cwd=tmp_path, capture_output=True, text=True)

    assert call('--config.optimizer.peak_lr=0.25').stdout.strip() == '0.25'
    assert 'Did you mean "peak_lr"' in call('--config.optimizer.peak_ll=0.25').stderr


def test_free_of_config_dicts():
    experiment = load()
    for value in dataclasses.asdict(experiment).values():
        assert type(value).__module__ == 'builtins'
