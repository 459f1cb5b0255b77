"""How long a training step takes, from its work and what a chip can do; nothing is measured."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from dalle_jax.planning import memory
from dalle_jax.planning.hardware import Chip, Topology
from dalle_jax.planning.network import USED, Link
from dalle_jax.training.step import Task

# Share of a chip's FLOP/s that matrix products get, from and to. Training with other JAX programs,
# at widths of 4096 and more, uses 53 to 71 % of v4, v5e and v5p, 45 % of v6e and 38 to 50 % of H100
# (MaxText, README of 2025), recomputation not counted.
EFFICIENCY = {'tpu': (0.55, 0.75), 'v6e': (0.45, 0.65), 'cuda': (0.50, 0.65)}

# Work of the backward pass that has been done before, in forward passes.
RECOMPUTED = {'none': 0.0, 'dots': 0.0, 'all-but-mlp': 1 / 3, 'full': 1.0}

# Times that what a layer without recomputing keeps goes through memory: written, read, and again as
# gradients.
TRIPS = 4

EXPOSED = 0.5  # share of the network's time that nothing hides, at worst


def efficiency(chip: Chip) -> tuple[float, float]:
    """Of this chip, from EFFICIENCY."""
    return EFFICIENCY.get(chip.name, EFFICIENCY[chip.platform])


class Duration(NamedTuple):
    """Of a step, in seconds; ranges are (least, most).

    Attributes:
      model_flops: of all chips, 3 times those of a forward pass.
      executed_flops: with what is recomputed.
      products: matrix products.
      elementwise: what memory bandwidth limits in the model.
      network: all collectives, one after the other.
      update: the optimiser's reading and writing.
      step: all together.
      mfu: model FLOPs a second as a share of the chips' peak.
      limit: what takes longest.
    """

    model_flops: int
    executed_flops: float
    products: tuple[float, float]
    elementwise: float
    network: float
    update: float
    step: tuple[float, float]
    mfu: tuple[float, float]
    limit: str


def estimate(task: Task, needs: memory.Memory, links: Sequence[Link], target: Topology
             ) -> Duration:
    """The duration of a step.

    At best the network is hidden behind the computation, or the other way round; at worst half of
    it adds to the computation.
    """
    chip, chips = target.chip, target.chips
    model = 3 * task.model.flops(task.config) * task.batch_size
    executed = model * (1 + RECOMPUTED[getattr(task.config, 'remat', 'none')] / 3)
    low, high = efficiency(chip)
    products = executed / (chips * chip.flops * high), executed / (chips * chip.flops * low)
    bandwidth = USED * chip.hbm_bandwidth
    plain = task
    if hasattr(task.config, 'remat'):
        plain = task._replace(config=dataclasses.replace(task.config, remat='none'))
    through = TRIPS * task.microbatches * memory.activations(plain, chip)[0]
    elementwise = through / bandwidth
    # Parameters and moments are read and written, gradients read.
    update = (2 * (needs.params + needs.moments) + needs.gradients) / bandwidth
    network = math.fsum(link.seconds for link in links)
    fast, slow = (seconds + elementwise for seconds in products)
    step = (max(fast, network) + update, max(slow + EXPOSED * network, network) + update)
    mfu = tuple(model / (seconds * chips * chip.flops) for seconds in reversed(step))
    times = {'matrix products': products[0], 'memory bandwidth': elementwise + update,
             'network': network}
    return Duration(model, executed, products, elementwise, network, update, step, mfu,
                    max(times, key=times.get))
