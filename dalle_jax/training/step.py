"""The training step: one pure function, jitted in one place."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.models.context import Context, Frozen, unconstrained
from dalle_jax.training import compression, precision
from dalle_jax.training.compression import CompressionConfig, Reducer
from dalle_jax.training.gradients import gradients
from dalle_jax.training.optimizer import (
    Optimizer, OptimizerConfig, average, average_on_host, clip_by_norm, make_optimizer, step_size,
    stored)
from dalle_jax.training.partition import replicated


class State(NamedTuple):
    """Everything a run needs to continue bit-exactly.

    Attributes:
      step: int32, batches seen: the data position; always advances.
      updates: int32, updates applied; drives the schedules and the bias correction.
      params: the model's, in OptimizerConfig.params_format.
      model_state: the model's other tree, float32.
      moments: the optimiser's.
      scales: precision.Scales of the resblocks, or {} where the run has none.
      residual: the reducer's state, such as error buffers of compressed gradients, or {}.
      averages: exponential average of params, float32, or {} where the run keeps none.
      key: PRNG key data of the run; step s uses fold_in(key, s).
    """

    step: jax.Array
    updates: jax.Array
    params: Any
    model_state: Any
    moments: Any
    scales: Any
    residual: Any
    averages: Any
    key: jax.Array


class Task(NamedTuple):
    """What is trained, and how: all of it static, none of it traced.

    Attributes:
      dtype: of matrix products; with float16 resblocks have gradient scales.
      batch_size: examples of a step, in all microbatches and on all devices.
      partition: partition.Partitioner of the mesh, or `unconstrained` without one.
    """

    model: ModuleType
    config: Any
    optimizer: OptimizerConfig
    batch_size: int
    compression: CompressionConfig = CompressionConfig()
    microbatches: int = 1
    dtype: Any = jnp.float32
    prng: str = 'threefry2x32'
    partition: Any = unconstrained

    @property
    def scaled(self) -> bool:
        """Whether the resblocks have gradient scales."""
        return self.dtype == jnp.float16

    @property
    def replicas(self) -> int:
        """Whose gradients a reducer gets one by one; 0 where the compiler adds them up."""
        return self.partition.mesh.shape['replica'] if self.compression.rank else 0


def check(task: Task) -> None:
    """Raises ValueError where the parts of a task do not go together."""
    name = task.model.__name__.split('.')[-1]
    couples = getattr(task.model, 'couples_batch', False)
    if task.scaled and not hasattr(task.model, 'branches'):
        raise ValueError(f"precision 'float16' needs gradient scales, which {name} has not; choose "
                         "'bfloat16' or 'float32'")
    if task.microbatches > 1 and couples:
        raise ValueError(f'{name} compares the examples of a batch with each other, so '
                         f'loop.microbatches={task.microbatches} would change the loss; set it '
                         'to 1')
    if task.compression.rank and couples:
        raise ValueError(f'{name} compares the examples of a batch with each other, so replicas '
                         'have no gradients of their own; set compression.rank to 0')
    if task.compression.rank and (task.partition is unconstrained or task.replicas < 2):
        raise ValueError(f'compression.rank={task.compression.rank} compresses what replicas send '
                         'each other, and there is one; set mesh.replica to 2 or more, or '
                         'compression.rank to 0')


# -- the state -----------------------------------------------------------------------------------


def init_state(task: Task, seed: int) -> State:
    """The state before the first step, from random parameters."""
    key = jax.random.key(seed, impl=task.prng)
    params, model_state = task.model.init(task.config, jax.random.fold_in(key, 2**31 - 1))
    return fresh_state(task, params, model_state, key)


def fresh_state(task: Task, params: Any, model_state: Any, key: jax.Array) -> State:
    """A state at step 0 with the given parameters, float32."""
    averages = jax.tree.map(jnp.copy, params) if task.optimizer.average_decay else {}
    scales = {}
    if task.scaled:
        scales = precision.init(task.model.branches(task.config), task.batch_size)
    return State(jnp.int32(0), jnp.int32(0), stored(params, task.optimizer), model_state,
                 make_optimizer(task.optimizer, params).init(params), scales,
                 _reducer(task, params).init(), averages, jax.random.key_data(key))


def abstract_state(task: Task) -> State:
    """Shapes and dtypes of the state and, on a mesh, shardings.

    Raises:
      ValueError: the task does not go together, or the mesh does not divide an array.
    """
    check(task)
    state = jax.eval_shape(lambda: init_state(task, 0))
    if task.partition is unconstrained:
        return state
    placed = task.partition.like_params(
        state, state.params, _param_shardings(task, state.params))._replace(
            residual=_reducer(task, state.params).shardings)
    if task.optimizer.average_memory == 'host':
        placed = placed._replace(averages=jax.tree.map(
            lambda s: s.with_memory_kind('pinned_host'), placed.averages))
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        state, placed)


def create_state(task: Task, seed: int) -> State:
    """`init_state`, each array made where it lives: none ever exists undivided."""
    abstract = abstract_state(task)
    placed = shardings(on_device(task, abstract))
    state = jax.jit(lambda: on_device(task, init_state(task, seed)), out_shardings=placed)()
    if task.optimizer.average_memory == 'host' and abstract.averages:
        # Leaf by leaf: the device may have no room for all.
        state = state._replace(averages=jax.tree.map(
            lambda p, a: jax.device_put(p.astype(a.dtype), a.sharding),
            state.params, abstract.averages))
    return state


def shardings(tree: Any) -> Any:
    """Of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda a: a.sharding, tree)


def best_params(state: State) -> Any:
    """What validation, sampling and later stages use: the averages where they are kept.

    Averages in the host's memory are copied to where the parameters live, in their dtype.
    """
    if not state.averages:
        return state.params

    def one(held, param):
        if held.sharding.memory_kind == param.sharding.memory_kind:
            return held
        return jax.device_put(held, param.sharding).astype(param.dtype)
    return jax.tree.map(one, state.averages, state.params)


def _param_shardings(task, params):
    return task.partition.shardings(task.model.axes(task.config), params)


def _reducer(task: Task, params: Any) -> Reducer:
    """How replicas agree on a gradient."""
    if not task.compression.rank:
        return compression.averaging()
    return compression.powersgd(task.compression, params, _param_shardings(task, params))


def abstract_saved(task: Task, abstract: State) -> State:
    """Of what `to_saved` returns, like `abstract_state`."""
    saved = jax.eval_shape(_reducer(task, abstract.params).to_saved, abstract.residual)
    placed = task.partition.like_params(saved, abstract.params, shardings(abstract.params))
    return abstract._replace(residual=jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), saved, placed))


def to_saved(task: Task, state: State) -> State:
    """What a checkpoint holds: of any number of replicas the same."""
    return state._replace(residual=jax.jit(_reducer(task, state.params).to_saved)(state.residual))


def from_saved(task: Task, saved: State) -> State:
    """The state of what a checkpoint holds."""
    reducer = _reducer(task, saved.params)
    return saved._replace(residual=jax.jit(
        reducer.from_saved, out_shardings=reducer.shardings)(saved.residual))


# -- the step ------------------------------------------------------------------------------------


def train_step(state: State, batch: Mapping[str, jax.Array], frozen: Mapping[str, Any], *,
               task: Task, optimizer: Optimizer, reducer: Reducer
               ) -> tuple[State, dict[str, jax.Array]]:
    """One update.

    Args:
      batch: name -> array with the global batch leading.
      frozen: name -> context.Frozen.

    Returns:
      the new state and float32 scalars: the loss, its terms, the model's metrics, the gradient
      norm, the step size, and 'skipped': 1 where the loss or the gradient is not finite, and then
      parameters, moments and the count of updates have not changed. With gradient scales also
      vectors of all resblocks, named by precision.names: 'log2_scale', and 'overflow', 1 where
      its gradient was not finite.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=task.prng), state.step)
    grads, counts, (terms, sums), model_state = gradients(state, batch, frozen, key, task)
    metrics = means(terms, sums)
    reduced = reducer.reduce(grads, state.residual)
    finite = jnp.isfinite(metrics['loss']) & reduced.finite
    clipped = clip_by_norm(reduced.grads, reduced.norm, task.optimizer.clip)
    params, moments = optimizer.update(state.params, clipped, state.moments, state.updates,
                                       metrics['loss'])
    if hasattr(task.model, 'constrain_params'):
        params = task.model.constrain_params(params)
    metrics |= {'gradient_norm': reduced.norm, 'skipped': 1.0 - finite,
                'learning_rate': step_size(task.optimizer, state.moments, state.updates)}

    updated = state._replace(updates=state.updates + 1, params=params, model_state=model_state,
                             moments=moments)
    # `where` on every leaf instead of lax.cond: donated buffers are reused either way.
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    state = state._replace(step=state.step + 1, residual=reduced.state)
    if state.averages:
        state = state._replace(averages=average(state.averages, state.params, state.step,
                                                task.optimizer))
    if state.scales:
        metrics |= {'log2_scale': jnp.log2(precision.vector(state.scales.value)),
                    'overflow': (precision.vector(counts) > 0).astype(jnp.float32)}
        state = state._replace(scales=precision.updated(state.scales, counts, task.batch_size))
    return state, metrics


def make_train(task: Task, abstract: State, group: int = 1):
    """The jitted training function over a group of steps.

    Args:
      abstract: of the state, see `abstract_state`.
      group: steps of one dispatch. Above 1 they are a scan, which saves the host's time where
        steps take less than a millisecond. Not on CPU: XLA runs convolutions inside a loop on one
        thread and 10 to 20 times slower than outside.

    Returns:
      (state, batches, frozen params, frozen static) -> (state, metrics): with group > 1 the
      batches have a leading axis of steps, and so have the metrics. The state is donated, and
      comes out where `abstract` says. Averages on the host stay out of it: give averages={}.
    """
    optimizer = make_optimizer(task.optimizer, abstract.params)
    reducer = _reducer(task, abstract.params)

    def train(state, batches, frozen_params, frozen_static):
        def one(state, batch):
            return train_step(state, batch, bind(frozen_static, frozen_params), task=task,
                              optimizer=optimizer, reducer=reducer)
        return one(state, batches) if group == 1 else jax.lax.scan(one, state, batches)

    placed = None
    if task.partition is not unconstrained:
        placed = shardings(on_device(task, abstract)), replicated(task.partition.mesh)
    return jax.jit(train, static_argnums=3, donate_argnums=0, out_shardings=placed)


def on_device(task: Task, state: State) -> State:
    """The part of the state that a training step gets: all but averages on the host."""
    return state._replace(averages={}) if task.optimizer.average_memory == 'host' else state


def with_averages(task: Task, state: State, averages: Any, step: int) -> State:
    """The state that came out of a training step, with the averages on the host after `step`."""
    if not averages or task.optimizer.average_memory == 'device':
        return state
    if step % task.optimizer.average_every == 0:
        averages = average_on_host(averages, state.params, task.optimizer)
    return state._replace(averages=averages)


def make_validate(task: Task):
    """The jitted validation of one batch: (params, model_state, batch, frozen) -> sums.

    Returns terms and metrics as sums and counts; see `added` and `means`.
    """
    def validate(params, model_state, batch, step, frozen_params, frozen_static):
        # A fixed key: noise in a validation loss is the same at every step of a run.
        ctx = Context(task.config, jax.random.key(0, impl=task.prng), step, False,
                      bind(frozen_static, frozen_params), task.dtype, task.partition)
        terms, metrics, _ = task.model.loss(params, model_state, batch, ctx)
        return terms, metrics

    return jax.jit(validate, static_argnums=5)


def make_snapshot(task: Task):
    """The jitted snapshot: (params, model_state, batch, step, frozen) -> arrays for the report."""
    def snapshot(params, model_state, batch, step, frozen_params, frozen_static):
        ctx = Context(task.config, jax.random.key(0), step, False,
                      bind(frozen_static, frozen_params), task.dtype)
        return task.model.snapshot(params, model_state, batch, ctx)

    return jax.jit(snapshot, static_argnums=5)


def means(terms: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """name -> mean of terms and metrics, and their weighted total as 'loss'."""
    values = {name: term.sum / term.count for name, term in terms.items()}
    total = sum(term.weight * values[name] for name, term in terms.items())
    return {'loss': total, **values, **{name: s / c for name, (s, c) in metrics.items()}}


def added(parts: Sequence[tuple[Mapping, Mapping]]) -> tuple[dict, dict]:
    """Terms and metrics of several batches as those of one: sums and counts added."""
    terms = {name: last._replace(sum=sum(t[name].sum for t, _ in parts),
                                 count=sum(t[name].count for t, _ in parts))
             for name, last in parts[-1][0].items()}
    metrics = {name: (sum(m[name][0] for _, m in parts), sum(m[name][1] for _, m in parts))
               for name in parts[-1][1]}
    return terms, metrics


def bind(static: tuple, params: Mapping[str, Any]) -> dict[str, Any]:
    """Frozen models from their hashable part, ((role, module, config), ...), and their params."""
    return {role: Frozen(module, config, params[role]) for role, module, config in static}
