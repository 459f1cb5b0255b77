"""Collectives of programs compiled on 8 devices in another process, see `measure`; of programs
compiled for TPUs and GPUs, whose text is stored here without what is not about them; and, marked
aot, of programs compiled for these now.

Stored programs: `*_step.hlo` is the gradient step of 4 layers x + down(gelu(up(x))), up and down
[1024, 4096] and [4096, 1024] divided over fsdp, on a mesh of replica 2 and fsdp 8.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.planning import collectives as lib
from dalle_jax.planning import hardware

AXES = ('replica', 'fsdp', 'tensor')
ROWS, COLUMNS, OUTER, INNER = 64, 512, 5, 3
WEIGHT = 2 * 1024 * 4096  # bytes of one of a stored step, bfloat16


def zoo(mesh):
    """Every kind of collective, in a loop in a loop: lowered, not compiled."""
    along = [(i, (i + 1) % mesh.shape['fsdp']) for i in range(mesh.shape['fsdp'])]

    def inner(x, _):
        return 0.5 * lax.ppermute(lax.psum(x, 'replica'), 'fsdp', along), None

    def outer(x, _):
        x, _ = lax.scan(inner, x, None, length=INNER)
        x = jnp.sin(lax.all_gather(x, 'fsdp', tiled=True))
        x = lax.psum_scatter(x, 'fsdp', tiled=True)
        x = lax.psum(lax.all_to_all(x, 'tensor', 1, 0, tiled=True), ('replica', 'fsdp'))
        return lax.all_to_all(jnp.cos(x), 'tensor', 0, 1, tiled=True), None

    run = jax.jit(jax.shard_map(lambda x: lax.scan(outer, x, None, length=OUTER)[0], mesh=mesh,
                                in_specs=PartitionSpec('fsdp'), out_specs=PartitionSpec('fsdp'),
                                check_vma=False))
    x = jax.ShapeDtypeStruct((ROWS * mesh.shape['fsdp'], COLUMNS), jnp.float32,
                             sharding=NamedSharding(mesh, PartitionSpec('fsdp')))
    platform = mesh.devices.flat[0].platform
    return run.trace(x).lower(lowering_platforms=('cuda' if platform == 'gpu' else platform,))


def expected(shape):
    """Summary of the zoo: executions, and bytes that a device sends in a ring."""
    size, (r, f, t) = 4 * ROWS * COLUMNS, (shape[axis] for axis in AXES)
    return {
        ('all-reduce', ('replica',)): (OUTER * INNER, OUTER * INNER * size * 2 * (r - 1) / r),
        ('collective-permute', ('fsdp',)): (OUTER * INNER, OUTER * INNER * size),
        ('all-gather', ('fsdp',)): (OUTER, OUTER * size * (f - 1)),
        ('reduce-scatter', ('fsdp',)): (OUTER, OUTER * size * (f - 1)),
        ('all-to-all', ('tensor',)): (2 * OUTER, 2 * OUTER * size * (t - 1) / t),
        ('all-reduce', ('replica', 'fsdp')): (OUTER, OUTER * size * 2 * (r * f - 1) / (r * f)),
    }


def measure():
    """All that needs 8 devices: [axes, shape, summary, those that leave a node of 4] of meshes."""
    found = []
    for shape in ((2, 4, 1), (2, 2, 2)):
        # Devices are numbered by their place in the mesh.
        devices = np.random.default_rng(0).permutation(jax.devices())
        mesh = Mesh(devices.reshape(shape), AXES)
        listed = lib.parse(zoo(mesh).compile().as_text(), mesh, node=4)
        found.append([list(shape), [[kind, list(axes), *total] for (kind, axes), total
                                    in lib.summary(listed).items()],
                      sorted({'+'.join(c.axes) for c in listed if c.between})])
    return found


@pytest.fixture(scope='module')
def found():
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, '-m', 'tests.planning.test_collectives'], cwd=root,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def stored(name):
    return (Path(__file__).parent / f'{name}.hlo').read_text()


def fake_mesh(*shape, ids=None):
    """What `parse` reads of a mesh."""
    devices = [SimpleNamespace(id=i) for i in ids or range(math.prod(shape))]
    return SimpleNamespace(shape=dict(zip(AXES, shape)),
                           devices=np.array(devices).reshape(shape))


def test_every_kind_in_loops(found):
    for shape, summary, leaving in found:
        summary = {(kind, tuple(axes)): (count, size) for kind, axes, count, size in summary}
        want = expected(dict(zip(AXES, shape)))
        assert summary == {key: total for key, total in want.items() if total[1]}
        assert leaving == ['replica', 'replica+fsdp']


def test_tpu_step():
    """Gathers that are spread over several fusions are counted once."""
    listed = lib.parse(stored('v5e_step'), fake_mesh(2, 8, 1))
    gathered, reduced = 7 / 8 * WEIGHT, 2 * (2 - 1) / 2 * WEIGHT / 8
    assert lib.summary(listed) == {
        # up and down in each of 4 layers, forward and backward
        ('all-gather', ('fsdp',)): (16, 16 * gathered),
        # the gradient of one of the two; that of the other is reduced at full size
        ('reduce-scatter', ('fsdp',)): (4, 4 * gathered),
        ('all-reduce', ('fsdp',)): (4, 4 * 2 * gathered),
        ('all-reduce', ('replica',)): (4, 4 * 2 * reduced),  # both at once
        ('all-reduce', ('replica', 'fsdp')): (1, 2 * 15 / 16 * 4),  # the loss
    }
    whole, = (c for c in listed if (c.kind, c.axes) == ('all-reduce', ('fsdp',)))
    assert whole.operands == (('bf16', (4096, 1024)),)


def test_gpu_step():
    listed = lib.parse(stored('h100_step'), fake_mesh(2, 8, 1), node=8)
    gathered, reduced = 7 / 8 * WEIGHT, 2 * (2 - 1) / 2 * WEIGHT / 8
    assert lib.summary(listed) == {
        ('all-gather', ('fsdp',)): (8, 16 * gathered),  # up and down at once
        ('reduce-scatter', ('fsdp',)): (4, 8 * gathered),
        ('all-reduce', ('replica',)): (4, 8 * reduced),
        ('all-reduce', ('replica', 'fsdp')): (1, 2 * 15 / 16 * 4),
    }
    assert {c.between for c in listed if c.axes == ('fsdp',)} == {False}
    assert {c.between for c in listed if 'replica' in c.axes} == {True}


def test_collective_matmul():
    """3 layers forward, up and down [2048, 8192] over fsdp 8: x @ w as the parts of w go around.

    In both directions at once, so that 4 trips of 2 parts each way see all 8; and one part more
    before the loop.
    """
    listed = lib.parse(stored('v5e_matmul'), fake_mesh(1, 8, 1))
    part = 2 * 2048 * 8192 / 8
    assert lib.summary(listed) == {
        ('collective-permute', ('fsdp',)): (3 * 2 * (8 + 1), 3 * 2 * (8 + 1) * part),
        ('all-reduce', ('fsdp',)): (1, 2 * 7 / 8 * 4)}
    assert {c.count for c in listed} == {1, 3, 3 * 2}


def test_between_slices():
    """The zoo in bfloat16, rows 512 and columns 1024, along replica instead of fsdp and tensor.

    On 4 slices of 2x2 and a mesh of replica 4, fsdp 2, tensor 2, so that replica is between slices,
    where hosts carry the data.
    """
    ids = [100_000 * (1 + s) + i for s in range(4) for i in range(4)]
    listed = lib.parse(stored('v5e_slices'), fake_mesh(4, 2, 2, ids=ids))
    size, n = 2 * 512 * 1024, 4
    assert lib.summary(c for c in listed if c.between) == {
        # Those over replica and fsdp reduce inside the slice first, each device its half.
        ('all-reduce', ('replica',)): (20, (15 + 5 / 2) * size * 2 * (n - 1) / n),
        ('collective-permute', ('replica',)): (15, 15 * size),
        ('all-gather', ('replica',)): (5, 5 * size * (n - 1)),
        ('reduce-scatter', ('replica',)): (5, 5 * size * (n - 1)),
        ('all-to-all', ('replica',)): (10, 10 * size * (n - 1) / n)}
    assert lib.summary(c for c in listed if not c.between) == {
        ('reduce-scatter', ('fsdp',)): (5, 5 * size / 2),
        ('all-gather', ('fsdp',)): (5, 5 * size / 2)}


PROGRAM = """HloModule test, num_partitions={devices}

%add () -> () {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%condition () -> pred[] {{
  %state = (s32[], f32[6], s32[]) parameter(0)
  %counter = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %end = s32[] constant({end})
  ROOT %less = pred[] compare(%counter, %end), direction={direction}
}}

%body () -> () {{
  %state = (s32[], f32[6], s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %x = f32[6]{{0:T(128)}} get-tuple-element(%state), index=1
  %step = s32[] get-tuple-element(%state), index=2
  %sum = f32[6]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add
  %next = s32[] add(%counter, %step)
  ROOT %after = (s32[], f32[6], /*index=2*/s32[]) tuple(%next, %sum, %step)
}}

ENTRY %main () -> () {{
  %start = s32[] constant({start})
  %begin = s32[] copy(%start)
  %step = s32[] constant({step})
  %x = f32[6]{{0}} parameter(0)
  %before = (s32[], f32[6], s32[]) tuple(%begin, %x, %step)
  ROOT %loop = (s32[], f32[6], s32[]) while(%before), condition=%condition, body=%body
}}
"""


def program(groups='{{0,1}}', devices=2, start=0, end=1, step=1, direction='LT'):
    return PROGRAM.format(groups=groups, devices=devices, start=start, end=end, step=step,
                          direction=direction)


@settings(max_examples=50, deadline=None)
@given(start=st.integers(-20, 20), end=st.integers(-20, 20),
       step=st.integers(-4, 4).filter(bool))
def test_trips_follow_from_constants(start, end, step):
    text = program(start=start, end=end, step=step, direction='LT' if step > 0 else 'GT')
    trips = len(range(start, end, step))
    assert [c.count for c in lib.parse(text, fake_mesh(2, 1, 1))] == [trips]


def test_unknown_trips():
    with pytest.raises(ValueError, match='loop'):
        lib.parse(program().replace('constant(0)', 'parameter(1)'), fake_mesh(2, 1, 1))
    noted = program().replace('constant(0)', 'parameter(1)').replace(
        'body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert [c.count for c in lib.parse(noted, fake_mesh(2, 1, 1))] == [7]


def test_what_kernels_say_of_themselves():
    """On lines of their own, in the middle of an instruction; they end no computation."""
    kernel = '''  %kernel = f32[6] custom-call(%x), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(train)"}
  %sum = f32[6]'''
    text = program(end=3).replace('  %sum = f32[6]', kernel)
    assert '}}, metadata' in text
    assert [c.count for c in lib.parse(text, fake_mesh(2, 1, 1))] == [3]


@settings(max_examples=50, deadline=None)
@given(shape=st.tuples(*[st.sampled_from((1, 2, 3, 4))] * 3).filter(lambda s: math.prod(s) > 1),
       chosen=st.sets(st.sampled_from(AXES), min_size=1))
def test_axes_of_groups(shape, chosen):
    """All ways to write that devices which differ along the chosen axes take part together."""
    inside = [i for i, axis in enumerate(AXES) if axis in chosen]
    outside = [i for i in range(3) if i not in inside]
    ids = np.arange(math.prod(shape)).reshape(shape)
    groups = [[int(ids[tuple(dict(zip(outside + inside, a + b))[i] for i in range(3))])
               for b in itertools.product(*(range(shape[i]) for i in inside))]
              for a in itertools.product(*(range(shape[i]) for i in outside))]
    want = tuple(AXES[i] for i in inside if shape[i] > 1)
    written = {
        'listed': str(groups).replace('[', '{').replace(']', '}').replace(' ', ''),
        'iota': f'[{len(groups)},{len(groups[0])}]<=[{shape[0]},{shape[1]},{shape[2]}]'
                f"T({','.join(map(str, outside + inside))})",
        'mesh': "mesh['a'={},'b'={},'c'={}] {{{}}}".format(
            *shape, ','.join(f"'{'abc'[i]}'" for i in inside)),
        'ordered mesh': "mesh['o'={},'i'={}], device_ids=([{},{},{}]T({})) {{'i'}}".format(
            len(groups), len(groups[0]), *shape, ','.join(map(str, outside + inside)))}
    for way, text in written.items():
        listed = lib.parse(program(text, math.prod(shape)), fake_mesh(*shape))
        n = len(groups[0])
        assert [(c.group, c.axes, c.bytes) for c in listed] == (
            [(n, want, 2 * (n - 1) / n * 24)] if n > 1 else []), way


def test_part_of_an_axis():
    """'a':(2)2 is the middle one of an axis of 8 = 2 * 2 * 2."""
    listed = lib.parse(program("mesh['a'=8] {'a':(2)2}", 8), fake_mesh(2, 2, 2))
    assert [(c.group, c.axes) for c in listed] == [(2, ('fsdp',))]


def test_other_mesh():
    with pytest.raises(ValueError, match='8 devices'):
        lib.parse(program(devices=8), fake_mesh(3, 1, 1))
    with pytest.raises(ValueError, match='ENTRY'):
        lib.parse('HloModule test', fake_mesh(1, 1, 1))


@pytest.mark.aot
@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x2', 'h100:1x8'])
def test_compiled_ahead_of_time(topology):
    try:
        devices = hardware.devices(hardware.topology(topology))
    except hardware.NoCompiler as error:
        pytest.skip(str(error))
    mesh = Mesh(np.array(devices).reshape(2, 2, 2), AXES)
    listed = lib.parse(zoo(mesh).compile().as_text(), mesh)
    assert lib.summary(listed) == expected(mesh.shape)


if __name__ == '__main__':
    jax.config.update('jax_num_cpu_devices', 8)
    print(json.dumps(measure()))
