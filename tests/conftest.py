"""Strict JAX: two virtual CPU devices, no silent rank promotion, a compilation cache of our own."""

import os
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests compile much and compute little; processes that tests start inherit this.
os.environ['XLA_FLAGS'] = ' '.join(['--xla_backend_optimization_level=0',
                                    '--xla_cpu_use_fusion_emitters=false',  # half the time
                                    os.environ.get('XLA_FLAGS', '')])
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='dalle_jax_tests_')

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')

LONGEST = ('test_end_to_end.py', 'test_train.py', 'test_mesh.py', 'test_experiments.py')


def pytest_collection_modifyitems(items):
    """Files that take long begin first, so that the processes end together."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
