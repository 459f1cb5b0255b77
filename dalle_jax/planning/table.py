"""The presets on all chips, as a table in Markdown: where each trains, and for how long."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from dalle_jax.planning import advice, duration, hardware, memory, network
from dalle_jax.planning.hardware import CHIPS, Chip, Topology
from dalle_jax.training import partition, step as step_lib
from dalle_jax.training.step import Task

DAY = 86_400


class Entry(NamedTuple):
    """The fewest chips of a kind on which a preset trains.

    Attributes:
      target: the chips.
      task: on its mesh.
      needs: memory, estimated.
      time: Duration of a step.
    """

    target: Topology
    task: Task
    needs: memory.Memory
    time: duration.Duration


def table(presets: Mapping[str, Callable[[Chip], Task]], steps: int) -> Iterator[str]:
    """Lines of the table, as they are done.

    Args:
      presets: name -> function of a chip that makes the task, with any mesh.
      steps: of the training whose chip-days are told.
    """
    yield '| | ' + ' | '.join(CHIPS) + ' |'
    yield '|' + ' --- |' * (1 + len(CHIPS))
    for name, make in presets.items():
        cells = [_cell(smallest(make(chip), chip), steps) for chip in CHIPS.values()]
        yield f'| {name} | ' + ' | '.join(cells) + ' |'


def smallest(task: Task, chip: Chip) -> Entry | None:
    """Where the task fits, with the least fsdp and then the fewest microbatches; None: nowhere."""
    for target in _topologies(chip):
        for fsdp in (2**n for n in range(int(math.log2(target.per_slice)) + 1)):
            mesh = AbstractMesh((target.chips // fsdp, fsdp, 1), partition.AXES)
            placed = task._replace(partition=partition.Partitioner(mesh))
            try:
                abstract = step_lib.abstract_state(placed)
            except ValueError:  # an array that this mesh does not divide
                break
            local = task.batch_size // target.chips
            for microbatches in (2**n for n in range(local.bit_length())):
                fewer = placed._replace(microbatches=microbatches)
                needs = memory.estimate(fewer, abstract, chip)
                if needs.peak <= advice.FITS * chip.hbm:
                    links = network.links(network.expected(fewer, abstract, target), target)
                    return Entry(target, fewer, needs,
                                 duration.estimate(fewer, needs, links, target))
    return None


def _topologies(chip):
    """One of every power of two of chips, the nearest to a square or cube; of GPUs up to 16 nodes.
    """
    if chip.platform == 'cuda':
        nodes = [(1, n) for n in (1, 2, 4, 8)] + [(n, 8) for n in (2, 4, 8, 16)]
        yield from (Topology(chip, (n,), several) for several, n in nodes)
        return
    best = {}
    for shape in hardware.shapes(chip):
        count = math.prod(shape)
        if count & (count - 1) == 0 and count <= 1024:
            best[count] = min(best.get(count, shape), shape, key=max)
    yield from (Topology(chip, best[count]) for count in sorted(best))


def _cell(entry: Entry | None, steps: int) -> str:
    if entry is None:
        return '-'
    low, high = (_rounded(seconds * entry.target.chips * steps / DAY)
                 for seconds in entry.time.step)
    return f'{entry.target.chips}: {low}' + f' - {high}' * (low != high)


def _rounded(value: Any) -> str:
    """To two digits."""
    digits = max(0, int(math.log10(max(value, 1))) - 1)
    return f'{round(value / 10**digits) * 10**digits:,}'
