"""AdamW over the parameter tree, its schedules, clipping and parameter averaging.

Ours is one elementwise update over whole leaves (optax.adamw is its oracle in the tests), with
the running-variance clip of Ramesh et al. 2021, app. B.2, and with parameters and moments stored in
16 bits where asked for (sec. 2.4, app. D). The small scenes experiments use Muon (Jordan et al.
2024) for matrices instead, from optax.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dalle_jax.training import formats
from dalle_jax.training.partition import path_name

# app. D.2: gains, biases, embeddings and unembeddings; their gradients are not compressed either.
EXCEPTIONS = (r'(bias|gain|tokens|positions|rows|columns|pads|start|class|log_scale|projection)$'
              r'|patches/kernel$|^heads/')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: 'adamw', or 'muon': Muon for the parameters that match `muon`, Adam for the rest.
      peak_lr: step size after `warmup` updates of linear increase.
      schedule: after the warm-up 'constant'; 'cosine' to `end_lr` at `decay_updates`, held after;
        'halving' at each update count listed in `halve_at`; or 'plateau': halving, `halvings`
        times at most, when the training loss no longer falls.
      plateau_window, plateau_patience, plateau_tolerance: the loss no longer falls when no mean of
        `plateau_window` updates in `plateau_patience` ones after the best was below it by this part
        of it. The paper does not state its rule.
      decay: regular expression on parameter paths such as 'body/0/mlp/up'; what matches decays.
      clip: global gradient norm above which the gradient is scaled down; 0 is off.
      variance_clip: the running variance is clipped to this value before use; 0 is off.
      params_format: how parameters are stored: 'float32', or 'bfloat16' or 'float16', then rounded
        stochastically: nearest rounding loses updates below half of the last place.
      mean_format, variance_format: how Adam's moments are stored, keys of formats.FORMATS; the
        paper's are '1-6-9' and '0-6-10'. Rounded to nearest.
      exceptions: regular expression on parameter paths; what matches, and its moments, stay
        float32.
      average_decay, average_every: every so many batches average = decay * average +
        (1 - decay) * params; 0 is off. Validation, sampling and later stages use the average.
      average_memory: where the averages live, 'device' or 'host', which frees four bytes a
        parameter. Copying takes time, so average seldom there; the paper does every 25 updates.
    """

    peak_lr: float
    name: str = 'adamw'
    schedule: str = 'cosine'
    warmup: int = 0
    decay_updates: int = 0
    end_lr: float = 0.0
    halve_at: tuple[int, ...] = ()
    halvings: int = 5
    plateau_window: int = 1000
    plateau_patience: int = 10
    plateau_tolerance: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = '.*'
    muon: str = ''
    clip: float = 0.0
    variance_clip: float = 0.0
    params_format: str = 'float32'
    mean_format: str = 'float32'
    variance_format: str = 'float32'
    exceptions: str = EXCEPTIONS
    average_decay: float = 0.0
    average_every: int = 1
    average_memory: str = 'device'

    def __post_init__(self):
        def require(holds, name, rule):
            if not holds:
                raise ValueError(f'optimizer.{name} is {getattr(self, name)!r}; {rule}')

        require(self.name in ('adamw', 'muon'), 'name', "choose 'adamw' or 'muon'")
        require(self.schedule in ('constant', 'cosine', 'halving', 'plateau'), 'schedule',
                "choose 'constant', 'cosine', 'halving' or 'plateau'")
        if self.schedule == 'cosine' and self.decay_updates <= self.warmup:
            raise ValueError(f'optimizer.decay_updates={self.decay_updates} must exceed '
                             f'optimizer.warmup={self.warmup} for the cosine schedule')
        require(0 <= self.average_decay < 1, 'average_decay', 'it must be in [0, 1)')
        for name in ('average_every', 'plateau_window', 'plateau_patience', 'halvings'):
            require(getattr(self, name) >= 1, name, 'it must be at least 1')
        require(self.average_memory in ('device', 'host'), 'average_memory',
                "choose 'device' or 'host'")
        require(self.params_format in ('float32', 'bfloat16', 'float16'), 'params_format',
                "choose 'float32', 'bfloat16' or 'float16', which the model can read as they are")
        require(self.mean_format in formats.FORMATS and self.mean_format != '0-6-10',
                'mean_format', "choose 'float32', 'bfloat16', 'float16' or '1-6-9'")
        require(self.variance_format in formats.FORMATS, 'variance_format',
                f'choose one of {", ".join(formats.FORMATS)}')
        if self.name == 'muon':
            require(self.muon, 'muon', "with optimizer.name='muon' it must be a regular expression "
                    'of the parameters it applies to')
            require(self.schedule != 'plateau', 'schedule', "only 'adamw' has it")
            for name in ('params_format', 'mean_format', 'variance_format'):
                require(getattr(self, name) == 'float32', name, "only 'adamw' stores 16 bits")


class Optimizer(NamedTuple):
    """A pair of pure functions.

    init(params) -> moments
    update(params, grads, moments, updates, loss) -> (params, moments), `updates` counting those
      applied before this one
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[Any, Any]]


def make_optimizer(config: OptimizerConfig, params: Any) -> Optimizer:
    """The optimiser for this parameter tree (arrays or ShapeDtypeStructs)."""
    return _adamw(config, params) if config.name == 'adamw' else _muon(config, params)


def learning_rate(config: OptimizerConfig) -> Callable[[jax.Array], jax.Array]:
    """The step size as a function of the number of updates applied before this one.

    Without what the schedule 'plateau' learns from the loss, see `step_size`.
    """
    if config.schedule in ('constant', 'plateau'):
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


def step_size(config: OptimizerConfig, moments: Any, updates: jax.Array) -> jax.Array:
    """The step size of the next update."""
    rate = learning_rate(config)(updates)
    return rate * moments['plateau'].scale if config.schedule == 'plateau' else rate


def _plateau(config):
    """Halves its scale when the loss no longer falls."""
    return optax.contrib.reduce_on_plateau(
        factor=0.5, patience=config.plateau_patience, rtol=config.plateau_tolerance,
        accumulation_size=config.plateau_window, min_scale=0.5**config.halvings)


def clip_by_norm(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Scales the gradient so that its global norm is at most `limit` (0: unchanged)."""
    if not limit:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, grads)


def average(averages: Any, params: Any, step: jax.Array, config: OptimizerConfig) -> Any:
    """The exponential moving average of the parameters after `step` batches, float32.

    Batches whose update was skipped count: the host knows only batches.
    """
    due = step % config.average_every == 0
    rate = jnp.where(due, 1 - config.average_decay, 0.0)
    return jax.tree.map(lambda a, p: a + rate * (p.astype(jnp.float32) - a), averages, params)


def average_on_host(averages: Any, params: Any, config: OptimizerConfig) -> Any:
    """The same, of averages in the host's memory, where it is due.

    One leaf after the other, so that no more than one is on the device. Returns before it is done.
    """
    def one(held, param):
        return _average_leaf(held.sharding)(held, param, 1 - config.average_decay)
    return jax.tree.map(one, averages, params)


@functools.cache
def _average_leaf(sharding):
    def one(held, param, rate):
        held = jax.device_put(held, jax.memory.Space.Device)
        return held + rate * (param.astype(jnp.float32) - held)
    return jax.jit(one, out_shardings=sharding)


def matches(pattern: str, name: str) -> bool:
    """Whether a parameter's path, such as 'tail/0/mlp/up', matches."""
    return re.search(pattern, name) is not None


def stored(params: Any, config: OptimizerConfig) -> Any:
    """float32 parameters as they are stored, rounded to nearest."""
    def one(path, p):
        return formats.encode(p, _format(config.params_format, config, path))
    return jax.tree_util.tree_map_with_path(one, params)


def _format(format, config, path):
    """`format`, or float32 where the parameter at this path is an exception."""
    return 'float32' if matches(config.exceptions, path_name(path)) else format


def matching(pattern: str, params: Any) -> Any:
    """A tree of bools: whether the leaf's path, such as 'tail/0/mlp/up', matches the pattern."""
    def one(path, _):
        return matches(pattern, path_name(path))
    return jax.tree_util.tree_map_with_path(one, params)


class _Leaf(NamedTuple):
    """Of a parameter: its number, the formats of it and its moments, whether it decays."""

    index: int
    params: str
    mean: str
    variance: str
    decays: bool


def _adamw(config: OptimizerConfig, params: Any) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), computed in float32, elementwise over whole leaves.

    Decoding, update, rounding and its random bits are one loop over a leaf and need no other array.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = tree.unflatten(
        _Leaf(index, *(_format(format, config, path) for format in (
            config.params_format, config.mean_format, config.variance_format)),
            matches(config.decay, path_name(path)))
        for index, (path, _) in enumerate(flat))

    def init(params):
        def zeros(p, format):
            return jnp.zeros(p.shape, formats.storage_dtype(format))
        moments = {'mean': jax.tree.map(lambda p, leaf: zeros(p, leaf.mean), params, leaves),
                   'variance': jax.tree.map(lambda p, leaf: zeros(p, leaf.variance), params,
                                            leaves)}
        if config.schedule == 'plateau':
            moments['plateau'] = _plateau(config).init(jnp.zeros(()))
        return moments

    def update(params, grads, moments, updates, loss):
        lr, count = step_size(config, moments, updates), updates + 1
        unbias1, unbias2 = 1 - config.b1**count, 1 - config.b2**count

        def one(p, g, m, v, leaf):
            p, m, v = (formats.decode(x, format) for x, format in (
                (p, leaf.params), (m, leaf.mean), (v, leaf.variance)))
            g = g.astype(jnp.float32)
            m = config.b1 * m + (1 - config.b1) * g
            v = config.b2 * v + (1 - config.b2) * g * g
            if config.variance_clip:
                v = jnp.minimum(v, config.variance_clip)
            step = (m / unbias1) / (jnp.sqrt(v / unbias2) + config.eps)
            if leaf.decays:
                step = step + config.weight_decay * p
            bits = None
            if leaf.params != 'float32':
                bits = formats.random_bits(updates, leaf.index, p.shape)
            return (formats.encode(p - lr * step, leaf.params, bits),
                    formats.encode(formats.clamped(m, leaf.mean), leaf.mean),
                    formats.encode(formats.clamped(v, leaf.variance), leaf.variance))

        new = jax.tree.map(one, params, grads, moments['mean'], moments['variance'], leaves)
        params, mean, variance = jax.tree.transpose(
            jax.tree.structure(params), jax.tree.structure((0, 0, 0)), new)
        new = {'mean': mean, 'variance': variance}
        if config.schedule == 'plateau':
            _, seen = _plateau(config).update({}, moments['plateau'], value=loss)
            # The loss falls fast while the step size grows: its best would be of no use.
            new['plateau'] = jax.tree.map(
                lambda a, b: jnp.where(updates >= config.warmup, a, b), seen, moments['plateau'])
        return params, new

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

    def update(params, grads, moments, updates, loss):
        del updates, loss  # optax counts for itself
        steps, moments = transform.update(grads, moments, params)
        return optax.apply_updates(params, steps), moments

    return Optimizer(transform.init, update)
