"""Every experiment traces: a full training step by shapes alone, with its parameter count."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from dalle_jax import config as config_lib
from dalle_jax.models import dalle, dvae
from dalle_jax.models.context import Frozen
from dalle_jax.training import step as step_lib

# experiment -> parameters. The paper's sizes are derived in the tests of the models; the family's
# other sizes are 12 L d^2 + L 13 d + 2 d + embeddings and heads.
COUNTS = {
    'dvae.py:paper,path=X': 97_616_006,
    'dvae.py:medium,path=X': None,
    'dvae.py:small,path=X': None,
    'dvae.py:tiny,path=X': None,
    'dvae.py:scenes': None,
    'dvae.py:folder,path=X': None,
    'dalle.py:12b,path=X': 12_292_816_384,
    **{f'dalle.py:{size},path=X': None for size in (
        '5.6b', '2.8b', '1.4b', '1.3b', '0.7b', 'large', 'base', 'small', 'tiny')},
    'dalle.py:12b_one_gpu,path=X': 12_292_816_384,
    'dalle.py:scenes': None,
    'dalle.py:folder,path=X': None,
    'clip.py:b32,path=X': None,
    'clip.py:b16,path=X': None,
    'clip.py:l14,path=X': None,
    'clip.py:scenes': None,
    'clip.py:folder,path=X': None,
    'features.py:scenes': 157_720,
    'features.py:folder,path=X': None,
}


def family_count(config):
    """The parameters of a DALL-E, from its sizes."""
    d, depth = config.width, config.depth
    layers = depth * (12 * d * d + 13 * d) + 2 * d
    inputs = (config.text_vocab + 2 * config.text_length + 2 + config.image_vocab
              + sum(config.grid)) * d
    return layers + inputs + (config.text_vocab + config.image_vocab) * d


@pytest.mark.parametrize('spec', COUNTS)
def test_sizes(spec):
    experiment = config_lib.resolve(config_lib.load(f'experiments/{spec}'))
    model = config_lib.model_module(experiment.model)
    shapes = jax.eval_shape(lambda: model.init(experiment.arch, jax.random.key(0))[0])
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == (family_count(experiment.arch) if experiment.model == 'dalle' else count)
    assert COUNTS[spec] in (None, count)
    jax.tree.map(lambda a, names: pytest.fail(f'{a.shape} {names}') if a.ndim != len(names)
                 else None, shapes, model.axes(experiment.arch))


# Differ from others in nothing but numbers.
SIZES = ('5.6b', '2.8b', '1.4b', '1.3b', '0.7b', 'large', 'base', 'small', 'tiny', 'medium', 'b16',
         'l14', 'folder')


@pytest.mark.parametrize('spec', [
    pytest.param(spec, marks=pytest.mark.slow) if re.search(r':([\w.]+)', spec)[1] in SIZES else spec
    for spec in COUNTS])
def test_training_step_traces(spec):
    experiment = config_lib.resolve(config_lib.load(f'experiments/{spec}'))
    model = config_lib.model_module(experiment.model)
    arch, frozen = experiment.arch, {}
    if experiment.model == 'dalle':  # a tokenizer with the grid and vocabulary of the config
        size = 8 * arch.grid[0]
        tokenizer = dataclasses.replace(dvae.PRESETS['tiny'], image_size=size,
                                        vocab=arch.image_vocab)
        frozen = {'image': (dvae, tokenizer)}
        assert dalle.fit(arch, image_tokenizer_config=tokenizer,
                         text_vocab=arch.text_vocab) == arch
    params = {role: jax.eval_shape(lambda c=c, m=m: m.init(c, jax.random.key(0))[0])
              for role, (m, c) in frozen.items()}
    static = tuple((role, m, c) for role, (m, c) in frozen.items())
    bound = {role: Frozen(m, c, params[role]) for role, m, c in static}
    task = step_lib.Task(model, arch, experiment.optimizer, experiment.data.batch_size,
                         microbatches=experiment.loop.microbatches, dtype=jnp.bfloat16,
                         prng=experiment.loop.prng)
    state = jax.eval_shape(lambda: step_lib.init_state(task, experiment.seed))
    batch = {name: jax.ShapeDtypeStruct((experiment.data.batch_size, *leaf.shape), leaf.dtype)
             for name, leaf in model.batch_spec(arch, bound).items()}
    new, metrics = step_lib.make_train(task, state).eval_shape(state, batch, params, static)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
    assert all(jax.tree.leaves(same))
    assert metrics['loss'].shape == () and metrics['loss'].dtype == jnp.float32
