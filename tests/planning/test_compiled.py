"""Plans by compiling the real step against plans by formula; all marked aot, and not quick."""

import pytest

from dalle_jax import config, plan
from dalle_jax.planning import hardware

pytestmark = pytest.mark.aot


def compiled(spec, topology, mesh, changes):
    """The same plan by the compiler and by formula."""
    loaded = config.load(f'experiments/{spec}', changes)
    try:
        found = plan.run(loaded, topology, mesh, 'compile', lambda line: None)
    except hardware.NoCompiler as error:
        pytest.skip(str(error))
    return found, plan.run(loaded, topology, mesh, 'analytic')


def sent(found):
    """(kind, axes) -> bytes."""
    return {(link['kind'], tuple(link['axes'])): link['bytes'] for link in found['network']}


@pytest.mark.parametrize('spec,topology,mesh,changes', [
    ('dalle.py:tiny,batch=128', 'v5e:2x2', 'fsdp=4', {}),
    ('dalle.py:small,batch=64', 'v5p:2x2x1', 'replica=4', {'arch.remat': 'dots'}),
    ('dalle.py:12b', 'v5e:16x16', 'replica=16,fsdp=16', {'loop.microbatches': 4}),
    ('dalle.py:12b', 'v5p:8x8x16', 'replica=64,fsdp=16', {}),
    ('dalle.py:12b_one_gpu,batch=24', 'h200:1', '', {}),
    ('dalle.py:1.4b,batch=64', 'h100:8', 'fsdp=8', {}),
])
def test_agreement(spec, topology, mesh, changes):
    """On memory to 15 %, on what is sent to 15 or 25 %; and no layer's gradient is summed as a whole."""
    found, estimated = compiled(spec, topology, mesh, changes)
    assert (found['mode'], estimated['mode']) == ('compiled', 'analytic')
    assert found['fits'] and estimated['fits']
    assert estimated['memory']['peak'] == pytest.approx(found['memory']['peak'], rel=0.15)
    # Scatters of small arrays are compiled to rings of permutes, which send more.
    far = 0.25 if spec.startswith('dalle.py:tiny') else 0.15
    assert sum(sent(estimated).values()) == pytest.approx(sum(sent(found).values()), rel=far)
    assert not [name for name in found['summed_whole'] if name.startswith('transformer')]
    if topology in ('v5e:16x16', 'v5p:8x8x16'):
        for key, size in sent(estimated).items():
            assert size == pytest.approx(sent(found)[key], rel=0.15), key


def test_what_a_compiler_refuses():
    found, estimated = compiled('dalle.py:tiny,batch=2048', 'v5e:1x1', '', {})
    assert not found['fits'] and not estimated['fits']
    assert found['memory']['peak'] > found['memory']['hbm']
    assert found['change'] == estimated['change']
