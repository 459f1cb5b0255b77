"""What a training step sends over the network, without compiling it, and how long links take."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models import losses
from dalle_jax.planning.collectives import Collective
from dalle_jax.planning.hardware import Topology
from dalle_jax.planning.memory import local_examples, stacks
from dalle_jax.training import compression
from dalle_jax.training.gradients import LAYERS
from dalle_jax.training.optimizer import matches
from dalle_jax.training.partition import DATA, named_leaves, path_name
from dalle_jax.training.step import State, Task, shardings

USED = 0.8  # share of a link's bandwidth that large transfers get

# How often a step gathers the weights of a layer: forward, backward, and for what is recomputed,
# which leaves out products whose results nothing needs.
GATHERS = {'none': 2, 'dots': 2, 'all-but-mlp': 2, 'full': 7 / 3}

HLO_TYPES = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16', 'uint16': 'u16'}


class Link(NamedTuple):
    """What the collectives of one kind along the same mesh axes send in a step, and over what.

    Attributes:
      between: whether they leave a slice or node.
      count: how often they run.
      bytes: that a chip sends in all of them.
      bandwidth: bytes per second that a chip may send there.
    """

    kind: str
    axes: tuple[str, ...]
    between: bool
    count: int
    bytes: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        return self.bytes / (USED * self.bandwidth)


def links(collectives: Iterable[Collective], target: Topology) -> list[Link]:
    """Sums over the collectives of a step, those that take longest first.

    A ring along one mesh axis is taken to use the links of one dimension of a slice.
    """
    chip, totals = target.chip, {}
    for c in collectives:
        key = c.kind, c.axes, c.between
        count, size = totals.get(key, (0, 0.0))
        totals[key] = count + c.count, size + c.count * c.bytes
    found = []
    for (kind, axes, between), (count, size) in totals.items():
        inside = chip.inside * min(len(axes), chip.dimensions) / chip.dimensions
        found.append(Link(kind, axes, between, count, size, chip.between if between else inside))
    return sorted(found, key=lambda link: -link.seconds)


def expected(task: Task, abstract: State, target: Topology) -> list[Collective]:
    """The collectives of a step, as collectives.parse lists those of a compiled program.

    Of a program that gathers a layer's weights in the dtype of products whenever the layer is
    computed, sums gradients where their parameters live, and does nothing twice.

    Args:
      task: with a partition.Partitioner.
      abstract: its state, with shardings.
    """
    shape, found = task.partition.mesh.shape, []
    for name, kind, axes, dtype, size, count in _sent(task, abstract):
        axes = tuple(axis for axis in axes if shape[axis] > 1)
        group = math.prod(shape[axis] for axis in axes)
        if group > 1 and size and count:
            operand = HLO_TYPES[jnp.dtype(dtype).name], (round(size),)
            found.append(Collective(name, kind, (operand,), group, axes,
                                    _between(axes, shape, target), count))
    return found


def _sent(task: Task, abstract: State) -> Iterator[tuple]:
    """(name, kind, axes, dtype, numbers of an operand, count) of collectives, real or not."""
    config, m, shape = task.config, task.microbatches, task.partition.mesh.shape
    remat = getattr(config, 'remat', 'none')
    logical = {path_name(path): axes for path, axes in jax.tree_util.tree_flatten_with_path(
        task.model.axes(config), is_leaf=lambda x: isinstance(x, tuple))[0]}
    for name, leaf in named_leaves(abstract.params):
        layers = leaf.shape[0] if logical[name][:1] == ('layers',) else 1
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) // layers
        used, of_replicas = task.dtype if matches(LAYERS, name) else jnp.float32, ('replica',)
        if 'fsdp' not in str(leaf.sharding.spec):
            of_replicas = DATA
        elif matches(LAYERS, name):
            yield name, 'all-gather', ('fsdp',), used, part, m * layers * GATHERS[remat]
            yield name, 'reduce-scatter', ('fsdp',), used, part * shape['fsdp'], m * layers
        elif name.startswith('heads/'):  # chunk by chunk
            chunks = m * _chunks(config, name)
            yield name, 'all-gather', ('fsdp',), losses.exact(task.dtype), part, chunks
            yield name, 'reduce-scatter', ('fsdp',), used, part * shape['fsdp'], chunks
        else:  # a table, used and summed as a whole
            yield name, 'all-gather', ('fsdp',), used, part, 1
            part, of_replicas = part * shape['fsdp'], DATA
        if not task.compression.rank:
            yield name, 'all-reduce', of_replicas, used, part, m * layers
    if task.compression.rank:
        yield from _compressed(task, abstract)
    for blocks, states in stacks(config):
        # A layer has two outputs, sums over heads or hidden units, and gradients of two inputs.
        count = m * blocks.depth * (5 if remat == 'full' else 4)
        size = local_examples(task) * states * blocks.width
        yield 'states', 'all-reduce', ('tensor',), task.dtype, size, count


def _compressed(task, abstract):
    """What replicas send instead of gradients; see compression.mean_in_format."""
    sent = compression.bytes_sent(task.compression, abstract.params, shardings(abstract.params))
    replicas = task.partition.mesh.shape['replica']
    ring = 2 * (replicas - 1) / replicas
    codes = (sent['p'] + sent['q']) / ring / 2
    yield 'factors', 'all-to-all', ('replica',), jnp.uint16, codes, 1
    yield 'factors', 'all-gather', ('replica',), jnp.uint16, codes / replicas, 1
    yield 'others', 'all-reduce', ('replica',), jnp.float32, sent['others'] / ring / 4, 1


def _chunks(config: Any, name: str) -> int:
    """In how many pieces the logits of this head are made."""
    positions = {'heads/text': config.text_length - 1, 'heads/image': config.image_length}[name]
    return math.ceil(positions / losses.CHUNK)


def _between(axes, shape, target):
    """Whether a group along these axes has devices of several slices or nodes."""
    places = np.arange(math.prod(shape.values())).reshape(tuple(shape.values()))
    along = [i for i, axis in enumerate(shape) if axis in axes]
    groups = np.moveaxis(places, along, range(len(along))).reshape(
        math.prod(shape[axis] for axis in axes), -1)
    nodes = groups // target.per_slice
    return bool((nodes != nodes[:1]).any())
