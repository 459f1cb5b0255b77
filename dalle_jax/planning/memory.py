"""Memory of a training step on one chip, from shapes alone: nothing is compiled.

State and gradients follow from the shardings, and what the forward pass keeps for the backward pass
from a trace of the loss, so both hold for any model, remat policy and mesh. What a program needs
besides is a rule of thumb, fitted to compiled programs.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.models import losses, transformer
from dalle_jax.models.context import Context
from dalle_jax.planning.hardware import Chip
from dalle_jax.training import partition, precision, step as step_lib
from dalle_jax.training.gradients import LAYERS, rounded as rounding
from dalle_jax.training.optimizer import matches
from dalle_jax.training.partition import named_leaves
from dalle_jax.training.step import State, Task

LANES = 128  # of a TPU: rows of an array take up a multiple of so many numbers

# Examples of a trace: a prime, so that an array's size tells whether it has some for each of them.
EXAMPLES = 1009

# What the backward pass of a layer needs at once, fitted: bytes for each number of its input, and
# so many times its weights, gathered or as gradients. Programs that compute while they send need
# more: those for several GPUs, and on TPUs those that multiply by parts of weights as they arrive.
WORKING = {'tpu': 60, 'tpu overlapped': 280, 'cuda': 55, 'cuda overlapped': 230}
GATHERED = 1.6
# TPUs' compilers do that where it takes so many times as long as the weights take to arrive.
OVERLAPPED = 1.6


class Memory(NamedTuple):
    """Bytes on one chip at the peak of a step.

    Attributes:
      params, moments: of the state.
      others: of the state: averages, error buffers, a model's own.
      gradients: with microbatches, of their sum so far and of the one that is computed.
      activations: what the forward pass has kept for the backward pass.
      working: all else: copies of weights in 16 bits, gathered layers, the layer at hand.
    """

    params: int
    moments: int
    others: int
    gradients: int
    activations: int
    working: int

    @property
    def state(self) -> int:
        """What exists between steps, too."""
        return self.params + self.moments + self.others

    @property
    def peak(self) -> int:
        return sum(self)


def estimate(task: Task, abstract: State, chip: Chip) -> Memory:
    """What a step will need.

    The most of three moments: the loss, when all activations exist and no gradients; its end, when
    it is the other way round; and where the backward pass of scanned layers begins, with (zero)
    gradients of all of them, when those of the layers behind are done.

    Args:
      task: with a partition.Partitioner.
      abstract: its state, with shardings.
    """
    state = step_lib.on_device(task, abstract)
    params, moments = held(state.params), held(state.moments)
    known = params, moments, held(state) - params - moments
    rounded = jax.eval_shape(lambda tree: rounding(tree, task.dtype), state.params)
    rounded = jax.tree.map(lambda new, old: old.update(dtype=new.dtype), rounded, state.params)
    # Those that are divided by gradient scales are float32.
    gradients = held(state.params, jnp.float32) if task.scaled else held(rounded)
    total = held(state.params, jnp.float32) if task.microbatches > 1 else 0
    copies = sum(held(new) for new, old in zip(*map(jax.tree.leaves, (rounded, state.params)))
                 if new.dtype != old.dtype)
    if task.microbatches > 1:  # tables are gathered once
        copies += sum(leaf.size * leaf.dtype.itemsize for name, leaf in named_leaves(state.params)
                      if not matches(LAYERS, name) and _is_divided(leaf))
    kept, scanned = activations(task, chip)
    times = [Memory(*known, total, kept, copies + _logits(task)),
             Memory(*known, total + gradients, 0, copies)]
    if scanned:
        layer = _layer(task, state.params, chip)
        times.append(Memory(*known, total + gradients, scanned, copies + layer))
    return max(times, key=lambda memory: memory.peak)


def measured(peak: int, task: Task, abstract: State, chip: Chip) -> Memory:
    """The same of a compiled program, given its peak: what is not accounted for is `working`."""
    memory = estimate(task, abstract, chip)
    return memory._replace(working=memory.working + peak - memory.peak)


def held(tree: Any, dtype: Any = None) -> int:
    """Bytes of a tree of ShapeDtypeStructs on one device, all in `dtype` if one is given."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(dtype or a.dtype).itemsize
               for a in jax.tree.leaves(tree))


def stacks(config: Any) -> list[tuple[transformer.BlockConfig, int]]:
    """The stacks of layers that a model has, each with the states of its sequence."""
    if hasattr(config, 'blocks'):
        return [(config.blocks, config.blocks.layout.length)]
    if hasattr(config, 'image_blocks'):
        return [(config.image_blocks, (config.image_size // config.patch) ** 2 + 1),
                (config.text_blocks, config.text_length + 1)]
    return []


def local_examples(task: Task) -> int:
    """Of a microbatch, on one device."""
    ways = math.prod(task.partition.mesh.shape[axis] for axis in partition.DATA)
    return task.batch_size // task.microbatches // ways


def activations(task: Task, chip: Chip) -> tuple[int, int]:
    """Bytes on one device that the forward pass of a microbatch keeps: all, and of scanned layers.

    A compiler may keep less, and compute again what is cheap.
    """
    config, local, found = task.config, local_examples(task), stacks(task.config)
    groups = {blocks.groups for blocks, _ in found} - {0}
    widths = {blocks.width for blocks, _ in found}
    # Of queries, keys and values on a TPU.
    channels = {blocks.width // blocks.heads for blocks, _ in found if chip.platform == 'tpu'}
    everything = scanned = 0
    for shape, itemsize in _kept(task.model, config, task.dtype, task.scaled):
        size, power = math.prod(shape) * itemsize, 0
        while size % EXAMPLES == 0:
            size, power = size // EXAMPLES, power + 1
        if not power:
            continue  # parameters, and what is made of them alone
        if not found and itemsize != jnp.dtype(task.dtype).itemsize:
            continue  # of convolutions their inputs are kept, not what these are rounded from
        if shape[-1] in channels:
            size = size // shape[-1] * -(-shape[-1] // LANES) * LANES
        if widths and shape[-1] not in widths:  # heads or hidden units
            size //= task.partition.mesh.shape['tensor']
        # What compares all examples with each other: a device has the rows of its own ones.
        size *= local * (task.batch_size // task.microbatches) ** (power - 1)
        everything += size
        scanned += size if shape[0] in groups else 0
    return everything, scanned


@functools.lru_cache
def _kept(model, config, dtype, scaled):
    """(shape, itemsize) of the arrays that the gradient of the loss of EXAMPLES keeps."""
    def one(params, model_state, batch):
        scales = None
        if scaled:
            values = precision.init(model.branches(config), 1).value
            scales = precision.with_flags(values, values)
        ctx = Context(config, jax.random.key(0), 0, True, {}, dtype, scales=scales)

        def loss(params):
            terms, _, _ = model.loss(params, model_state, batch, ctx)
            return sum(t.weight * t.sum / t.count for t in terms.values())
        kept = jax.tree.leaves(jax.vjp(loss, params)[1])
        return list({id(array): array for array in kept}.values())

    params, model_state = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    batch = {name: jax.ShapeDtypeStruct((EXAMPLES, *a.shape), a.dtype)
             for name, a in model.batch_spec(config, {}).items()}
    return [(a.shape, a.dtype.itemsize) for a in jax.eval_shape(one, params, model_state, batch)]


def _is_divided(leaf):
    return leaf.sharding.shard_shape(leaf.shape) != leaf.shape


def _logits(task):
    """Bytes of the logits that exist at once."""
    if not hasattr(task.config, 'image_vocab'):
        return 0
    vocab = max(task.config.text_vocab, task.config.image_vocab)
    return 4 * losses.CHUNK * vocab * local_examples(task)


def _layer(task, params, chip):
    """Bytes that the backward pass of one layer needs."""
    found, mesh, local = stacks(task.config), task.partition.mesh.shape, local_examples(task)
    weights = sum(leaf.size for name, leaf in named_leaves(params)
                  if 'tail/0/' in name and matches(LAYERS, name))
    states = max((states for _, states in found), default=0)
    rule = chip.platform
    if rule == 'cuda':
        overlapped = math.prod(mesh.values()) > 1
    else:
        sent = chip.flops / (chip.inside / chip.dimensions)  # states in the time of a weight's way
        overlapped = mesh['fsdp'] > 1 and states * local > OVERLAPPED * sent
    numbers = local * max((blocks.width * states for blocks, states in found), default=0)
    return int(GATHERED * weights * jnp.dtype(task.dtype).itemsize
               + WORKING[rule + ' overlapped' * overlapped] * numbers) // mesh['tensor']
