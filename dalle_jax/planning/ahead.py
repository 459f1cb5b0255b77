"""Compiles the real training step for a topology, on a machine that has none of it."""

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.planning import collectives, hardware, memory, network
from dalle_jax.planning.collectives import Collective
from dalle_jax.planning.hardware import GIB, Topology
from dalle_jax.training import partition, step as step_lib
from dalle_jax.training.gradients import LAYERS
from dalle_jax.training.optimizer import matches
from dalle_jax.training.step import State, Task

TELL_EVERY = 30  # seconds

# Kernels are compiled, not timed, as there is nothing to time them on.
OPTIONS = {'cuda': {'xla_gpu_autotune_level': 0}, 'tpu': {}}


class Compiled(NamedTuple):
    """What a compiler says of a step.

    Attributes:
      seconds: that it took.
      peak: bytes on one chip, also of a program that it refuses for them.
      collectives: in the order of the program; None of one that it refuses.
      summed_whole: names of parameters whose gradients are summed at full size over the axes that
        divide them, see collectives.full_size.
    """

    seconds: float
    peak: int
    collectives: list[Collective] | None
    summed_whole: list[str]


def placed(task: Task, config: partition.MeshConfig, target: Topology) -> Task:
    """The task on a mesh of the topology's devices.

    Raises:
      NoCompiler: nothing here compiles for them.
    """
    mesh = partition.make_mesh(config, hardware.devices(target))
    return task._replace(partition=partition.Partitioner(mesh, config.rules))


def compiled(task: Task, target: Topology, group: int, say: Callable[[str], None]) -> Compiled:
    """Compiles the step as training does: donated state, shardings, kernels and all.

    Args:
      task: of `placed`.
      group: steps of one dispatch.
      say: is told now and then that it still compiles.
    """
    platform, mesh = target.chip.platform, task.partition.mesh
    abstract = step_lib.abstract_state(task)
    started = time.monotonic()
    with _told(say):
        lowered = step_lib.make_train(task, abstract, group).trace(
            step_lib.on_device(task, abstract), batches(task, group), {}, ()
            ).lower(lowering_platforms=(platform,))
        try:
            program = lowered.compile(OPTIONS[platform])
        except jax.errors.JaxRuntimeError as error:
            peak = _refused(str(error), memory.held(step_lib.on_device(task, abstract)))
            if peak is None:
                raise
            return Compiled(time.monotonic() - started, peak, None, [])
    seconds = time.monotonic() - started
    found = collectives.parse(program.as_text(), mesh, target.per_slice)
    return Compiled(seconds, program.memory_analysis().peak_memory_in_bytes, found,
                    summed_whole(found, task, abstract))


def batches(task: Task, group: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step reads, token records for models that can be trained on them."""
    lead = (group,) * (group > 1)
    spec = PartitionSpec(*(None,) * len(lead), *partition.BATCH)
    return {name: jax.ShapeDtypeStruct((*lead, task.batch_size, *a.shape), a.dtype,
                                       sharding=NamedSharding(task.partition.mesh, spec))
            for name, a in task.model.batch_spec(task.config, {}).items()}


def summed_whole(found: list[Collective], task: Task, abstract: State) -> list[str]:
    """Names of matrices divided over 'fsdp' whose gradients an all-reduce sums as a whole.

    They are sent twice as often as those that are scattered to where their parameters live. Told by
    an operand's dtype and shape or, where none has that shape, by how many numbers it has.
    """
    shapes, of_layers = {}, network.HLO_TYPES[jnp.dtype(task.dtype).name]
    for name, leaf in partition.named_leaves(abstract.params):
        spec = tuple(leaf.sharding.spec)
        if leaf.ndim >= 2 and 'fsdp' in str(spec):
            part = list(leaf.sharding.shard_shape(leaf.shape))
            axis = ['fsdp' in str(entry) for entry in spec].index(True)
            part[axis] *= leaf.sharding.mesh.shape['fsdp']
            # Of a stack, one layer at a time.
            shapes[name] = tuple(part[1:] if '/body/' in name else part)
    names = set()
    for c in found:
        if c.kind == 'all-reduce' and 'fsdp' in c.axes:
            for dtype, operand in c.operands:
                alike = {name: shape for name, shape in shapes.items()
                         if math.prod(shape) == math.prod(operand)
                         and dtype == (of_layers if matches(LAYERS, name) else 'f32')}
                exact = {name for name, shape in alike.items() if shape == operand}
                names |= exact or set(alike)
    return sorted(names)


def _refused(message, state):
    """Bytes that a program needs which does not fit, or None if that is not what was wrong."""
    if total := re.search(r'Used ([\d.]+)G of', message):
        return int(float(total[1]) * GIB)
    if temporaries := re.search(r'HLO temporaries \(([\d.]+)G\) exceeds', message):
        return int(float(temporaries[1]) * GIB) + state
    return None


@contextlib.contextmanager
def _told(say: Callable[[str], None]) -> Iterator[None]:
    started, done = time.monotonic(), threading.Event()

    def tell():
        while not done.wait(TELL_EVERY):
            say(f'still compiling after {time.monotonic() - started:.0f} s')

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
