"""AdamW over the parameter tree, its schedules, clipping and parameter averaging.

Ours is one elementwise update over whole leaves (optax.adamw is its oracle in the tests), with
the running-variance clip of Ramesh et al. 2021, app. B.2. The small scenes experiments use Muon
(Jordan et al. 2024) for matrices instead, from optax.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dalle_jax.training.partition import path_name


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: 'adamw', or 'muon': Muon for the parameters that match `muon`, Adam for the rest.
      peak_lr: step size after `warmup` updates of linear increase.
      schedule: after the warm-up 'constant'; 'cosine' to `end_lr` at `decay_updates`, held after;
        or 'halving' at each update count listed in `halve_at`.
      decay: regular expression on parameter paths such as 'body/0/mlp/up'; what matches decays.
      clip: global gradient norm above which the gradient is scaled down; 0 is off.
      variance_clip: the running variance is clipped to this value before use; 0 is off.
      average_decay, average_every: every so many updates average = decay * average +
        (1 - decay) * params; 0 is off. Validation, sampling and later stages use the average.
    """

    peak_lr: float
    name: str = 'adamw'
    schedule: str = 'cosine'
    warmup: int = 0
    decay_updates: int = 0
    end_lr: float = 0.0
    halve_at: tuple[int, ...] = ()
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = '.*'
    muon: str = ''
    clip: float = 0.0
    variance_clip: float = 0.0
    average_decay: float = 0.0
    average_every: int = 1

    def __post_init__(self):
        if self.name not in ('adamw', 'muon'):
            raise ValueError(f"optimizer.name is {self.name!r}; choose 'adamw' or 'muon'")
        if self.schedule not in ('constant', 'cosine', 'halving'):
            raise ValueError(f"optimizer.schedule is {self.schedule!r}; choose 'constant', "
                             "'cosine' or 'halving'")
        if self.schedule == 'cosine' and self.decay_updates <= self.warmup:
            raise ValueError(f'optimizer.decay_updates={self.decay_updates} must exceed '
                             f'optimizer.warmup={self.warmup} for the cosine schedule')
        if not 0 <= self.average_decay < 1:
            raise ValueError(f'optimizer.average_decay is {self.average_decay}; it must be in '
                             '[0, 1)')
        if self.name == 'muon' and not self.muon:
            raise ValueError("optimizer.name='muon' needs optimizer.muon, a regular expression of "
                             'the parameters it applies to')


class Optimizer(NamedTuple):
    """A pair of pure functions.

    init(params) -> moments
    update(params, grads, moments, updates) -> (params, moments), `updates` counting those applied
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]


def make_optimizer(config: OptimizerConfig, params: Any) -> Optimizer:
    """The optimiser for this parameter tree (arrays or ShapeDtypeStructs)."""
    return _adamw(config, params) if config.name == 'adamw' else _muon(config, params)


def learning_rate(config: OptimizerConfig) -> Callable[[jax.Array], jax.Array]:
    """The step size as a function of the number of updates applied before this one."""
    if config.schedule == 'constant':
        after = optax.constant_schedule(config.peak_lr)
    elif config.schedule == 'cosine':
        after = optax.cosine_decay_schedule(
            config.peak_lr, config.decay_updates - config.warmup, config.end_lr / config.peak_lr)
    else:
        after = optax.piecewise_constant_schedule(
            config.peak_lr, {at - config.warmup: 0.5 for at in config.halve_at})
    if not config.warmup:
        return after
    # The first update already moves: the ramp reaches its peak at update `warmup` exactly.
    ramp = optax.linear_schedule(config.peak_lr / config.warmup, config.peak_lr, config.warmup - 1)
    return optax.join_schedules([ramp, after], [config.warmup])


def clip_by_norm(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Scales the gradient so that its global norm is at most `limit` (0: unchanged)."""
    if not limit:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, grads)


def average(averages: Any, params: Any, updates: jax.Array, config: OptimizerConfig) -> Any:
    """The exponential moving average of the parameters after `updates` updates."""
    due = updates % config.average_every == 0
    rate = jnp.where(due, 1 - config.average_decay, 0.0)
    return jax.tree.map(lambda a, p: a + rate * (p - a), averages, params)


def matching(pattern: str, params: Any) -> Any:
    """A tree of bools: whether the leaf's path, such as 'tail/0/mlp/up', matches the pattern."""
    def one(path, _):
        return re.search(pattern, path_name(path)) is not None
    return jax.tree_util.tree_map_with_path(one, params)


def _adamw(config: OptimizerConfig, params: Any) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) in float32, elementwise over whole leaves."""
    rate = learning_rate(config)
    decays = matching(config.decay, params)

    def init(params):
        return {'mean': jax.tree.map(jnp.zeros_like, params),
                'variance': jax.tree.map(jnp.zeros_like, params)}

    def update(params, grads, moments, updates):
        lr, count = rate(updates), updates + 1
        unbias1, unbias2 = 1 - config.b1**count, 1 - config.b2**count

        def one(p, g, m, v, decay):
            m = config.b1 * m + (1 - config.b1) * g
            v = config.b2 * v + (1 - config.b2) * g * g
            if config.variance_clip:
                v = jnp.minimum(v, config.variance_clip)
            step = (m / unbias1) / (jnp.sqrt(v / unbias2) + config.eps)
            if decay:
                step = step + config.weight_decay * p
            return p - lr * step, m, v

        new = jax.tree.map(one, params, grads, moments['mean'], moments['variance'], decays)
        params, mean, variance = jax.tree.transpose(
            jax.tree.structure(params), jax.tree.structure((0, 0, 0)), new)
        return params, {'mean': mean, 'variance': variance}

    return Optimizer(init, update)


def _muon(config: OptimizerConfig, params: Any) -> Optimizer:
    """Muon on matrices and convolution kernels, Adam on the rest; both at the same step size."""
    numbers = optax.contrib.MuonDimensionNumbers
    uses = matching(config.muon, params)

    def dimension_numbers(p, use):
        if not use:
            return None
        # [..., in, out]; a convolution kernel [h, w, in, out] reduces over h, w and in. Stacked
        # layers [groups, in, out] have three dimensions and keep the first as a batch.
        return numbers((0, 1, 2), (3,)) if p.ndim == 4 else numbers((-2,), (-1,))

    transform = optax.contrib.muon(
        learning_rate(config), ns_steps=5, consistent_rms=0.2, adam_b1=config.b1,
        adam_b2=config.b2, weight_decay=config.weight_decay,
        weight_decay_mask=matching(config.decay, params),
        muon_weight_dimension_numbers=jax.tree.map(dimension_numbers, params, uses))

    def update(params, grads, moments, updates):
        del updates  # optax counts for itself
        steps, moments = transform.update(grads, moments, params)
        return optax.apply_updates(params, steps), moments

    return Optimizer(transform.init, update)
