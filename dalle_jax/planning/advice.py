"""What to change where a training step does not fit, or where there is room."""

import bisect
import dataclasses
import functools
import itertools
from typing import NamedTuple

from jax.sharding import AbstractMesh

from dalle_jax.models import transformer
from dalle_jax.planning import memory
from dalle_jax.planning.hardware import Topology
from dalle_jax.training import partition, step as step_lib
from dalle_jax.training.step import State, Task

# Of a chip's memory, as these are estimates: for what will fit and for what most surely will.
FITS, SURELY = 0.95, 0.85
ROWS = 8  # of a TPU's memory: parts of a matrix with a multiple of them are exchanged as they are

SIXTEEN_BITS = {'params_format': 'bfloat16', 'mean_format': '1-6-9', 'variance_format': '0-6-10'}


class Change(NamedTuple):
    """Another way to train the same.

    Attributes:
      flags: that make it, for the command line.
      task: changed, on an abstract mesh.
      needs: its memory, estimated.
    """

    flags: tuple[str, ...]
    task: Task
    needs: memory.Memory


def first_that_fits(task: Task, abstract: State, target: Topology) -> Change | None:
    """The least change after which a step fits, or None.

    In this order, later ones added to the earlier: recompute more, smaller microbatches, larger
    fsdp instead of replica, parameters and moments of 16 bits. If nothing of that helps, the
    largest batch that fits, which changes what is learned.
    """
    limit = FITS * target.chip.hbm
    found = (change for change in _changes(task, abstract, target, limit)
             if change.flags and change.needs.peak <= limit)
    return next(found, None) or _smaller_batch(task, abstract, target)


def least_recomputing(task: Task, abstract: State, target: Topology) -> Change | None:
    """The remat policy that recomputes least and surely fits, if that is less than the task's."""
    ladder = list(transformer.REMAT)
    for remat in ladder[:ladder.index(getattr(task.config, 'remat', ladder[0]))]:
        change = _change(task, abstract, target, config=_with_remat(task.config, remat))
        if change.needs.peak <= SURELY * target.chip.hbm:
            return change
    return None


def _changes(task, abstract, target, limit):
    """All but that of the batch, in that order; the first is none. Leaves out optimisers and meshes
    with which even the least memory is more than the limit."""
    for optimizer, mesh in itertools.product(_optimizers(task), _meshes(task, target)):
        placed = dataclasses.replace(task.partition, mesh=mesh)
        other = task._replace(optimizer=optimizer, partition=placed)
        try:
            abstract = abstract if other == task else step_lib.abstract_state(other)
        except ValueError:  # an array that this mesh does not divide
            continue
        change = functools.partial(_change, task, abstract, target, optimizer=optimizer,
                                   partition=placed)
        policies, splits = _smaller(task)
        ways = [functools.partial(change, config=_with_remat(task.config, remat))
                for remat in policies]
        ways += [functools.partial(ways[-1], microbatches=n) for n in splits]
        # Microbatches add a sum of gradients, so the last way need not be the smallest.
        if min(way().needs.peak for way in (ways[len(policies) - 1], ways[-1])) <= limit:
            yield from (way() for way in ways)


def _smaller_batch(task, abstract, target):
    """With the strongest policy and no microbatches."""
    local = memory.local_examples(task) * task.microbatches

    def change(n):
        return _change(task, abstract, target, microbatches=1,
                       batch_size=task.batch_size // local * n,
                       config=_with_remat(task.config, list(transformer.REMAT)[-1]))

    most = bisect.bisect_right(range(1, local), FITS * target.chip.hbm,
                               key=lambda n: change(n).needs.peak)
    return change(most) if most else None


def _change(task, abstract, target, **changes):
    changed = task._replace(**changes)
    return Change(_flags(task, changed), changed, memory.estimate(changed, abstract, target.chip))


def _with_remat(config, remat):
    return dataclasses.replace(config, remat=remat) if hasattr(config, 'remat') else config


def _smaller(task):
    """Remat policies, and behind them numbers of microbatches, from what it is to the smallest."""
    ladder = list(transformer.REMAT)
    policies = ladder[ladder.index(getattr(task.config, 'remat', ladder[-1])):]
    if getattr(task.model, 'couples_batch', False):
        return policies, []
    local = memory.local_examples(task)
    return policies, [task.microbatches * n for n in range(2, local + 1) if local % n == 0]


def _meshes(task, target):
    """From what it is to larger fsdp, as far as slices or nodes and rows of matrices go."""
    shape = task.partition.mesh.shape
    replica, fsdp, tensor = (shape[axis] for axis in partition.AXES)
    rows = ROWS if target.chip.platform == 'tpu' else 1
    widths = [blocks.width for blocks, _ in memory.stacks(task.config)]
    for n in range(1, replica + 1):
        inside = target.per_slice % (fsdp * n * tensor) == 0
        whole = all(width % (fsdp * n * rows) == 0 for width in widths)
        if replica % n == 0 and (n == 1 or inside and whole):
            yield AbstractMesh((replica // n, fsdp * n, tensor), partition.AXES)


def _optimizers(task):
    yield task.optimizer
    if task.optimizer.name == 'adamw' and task.optimizer.params_format == 'float32':
        yield dataclasses.replace(task.optimizer, **SIXTEEN_BITS)


def _flags(old, new):
    """The flags that turn one task into the other."""
    flags = []
    if getattr(new.config, 'remat', None) != getattr(old.config, 'remat', None):
        flags.append(f'--config.arch.remat={new.config.remat}')
    if new.microbatches != old.microbatches:
        flags.append(f'--config.loop.microbatches={new.microbatches}')
    if new.batch_size != old.batch_size:
        flags.append(f'--config.data.batch_size={new.batch_size}')
    if new.partition.mesh.shape != old.partition.mesh.shape:
        flags.append('--mesh=' + ','.join(f'{axis}={n}'
                                          for axis, n in new.partition.mesh.shape.items()))
    return tuple(flags + [f'--config.optimizer.{name}={getattr(new.optimizer, name)}'
                          for name in SIXTEEN_BITS
                          if getattr(new.optimizer, name) != getattr(old.optimizer, name)])
