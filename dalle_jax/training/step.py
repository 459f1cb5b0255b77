"""The training step: one pure function, jitted in one place."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dalle_jax.models.context import Context, Frozen
from dalle_jax.training.optimizer import (
    Optimizer, OptimizerConfig, average, clip_by_norm, learning_rate, make_optimizer)


class State(NamedTuple):
    """Everything a run needs to continue bit-exactly.

    Attributes:
      step: int32, batches seen: the data position; always advances.
      updates: int32, updates applied; drives the schedules and the bias correction.
      params, model_state: the model's trees, float32.
      moments: the optimiser's.
      averages: exponential average of params, or {} where the run keeps none.
      key: PRNG key data of the run; step s uses fold_in(key, s).
    """

    step: jax.Array
    updates: jax.Array
    params: Any
    model_state: Any
    moments: Any
    averages: Any
    key: jax.Array


class Task(NamedTuple):
    """What is trained: all of it static, none of it traced."""

    model: ModuleType
    config: Any
    optimizer: OptimizerConfig
    microbatches: int
    dtype: Any
    prng: str
    constrain: Any


def init_state(task: Task, seed: int) -> State:
    """The state before the first step, from random parameters."""
    key = jax.random.key(seed, impl=task.prng)
    params, model_state = task.model.init(task.config, jax.random.fold_in(key, 2**31 - 1))
    return fresh_state(task, params, model_state, key)


def fresh_state(task: Task, params: Any, model_state: Any, key: jax.Array) -> State:
    """A state at step 0 with the given parameters."""
    averages = jax.tree.map(jnp.copy, params) if task.optimizer.average_decay else {}
    return State(jnp.int32(0), jnp.int32(0), params, model_state,
                 make_optimizer(task.optimizer, params).init(params), averages,
                 jax.random.key_data(key))


def best_params(state: State) -> Any:
    """What validation, sampling and later stages use: the averages where they are kept."""
    return state.averages or state.params


def train_step(state: State, batch: Mapping[str, jax.Array], frozen: Mapping[str, Any], *,
               task: Task, optimizer: Optimizer) -> tuple[State, dict[str, jax.Array]]:
    """One update.

    Args:
      batch: name -> array with the global batch leading.
      frozen: name -> context.Frozen.

    Returns:
      the new state and float32 scalars: the loss, its terms, the model's metrics, the gradient
      norm, the step size, and 'skipped': 1 where the loss or the gradient is not finite, and then
      nothing but the step count has changed.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=task.prng), state.step)
    grads, metrics, model_state = _gradients(state, batch, frozen, key, task)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
    params, moments = optimizer.update(
        state.params, clip_by_norm(grads, norm, task.optimizer.clip), state.moments, state.updates)
    if hasattr(task.model, 'constrain_params'):
        params = task.model.constrain_params(params)
    updates = state.updates + 1
    averages = average(state.averages, params, updates, task.optimizer) if state.averages else {}
    updated = State(state.step, updates, params, model_state, moments, averages, state.key)
    # `where` on every leaf instead of lax.cond: donated buffers are reused either way.
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    metrics |= {'gradient_norm': norm, 'skipped': 1.0 - finite,
                'learning_rate': learning_rate(task.optimizer)(state.updates)}
    return state._replace(step=state.step + 1), metrics


def make_train(task: Task, state: State, group: int = 1, shardings: State | None = None):
    """The jitted training function over a group of steps.

    Args:
      state: the State or its ShapeDtypeStructs.
      group: steps of one dispatch. Above 1 they are a scan, which saves the host's time where
        steps take less than a millisecond. Not on CPU: XLA runs convolutions inside a loop on one
        thread and 10 to 20 times slower than outside.

      shardings: of the state that comes out; None leaves them to the compiler.

    Returns:
      (state, batches, frozen params, frozen static) -> (state, metrics): with group > 1 the
      batches have a leading axis of steps, and so have the metrics. The state is donated.
    """
    optimizer = make_optimizer(task.optimizer, state.params)

    def train(state, batches, frozen_params, frozen_static):
        def one(state, batch):
            return train_step(state, batch, bind(frozen_static, frozen_params), task=task,
                              optimizer=optimizer)
        return one(state, batches) if group == 1 else jax.lax.scan(one, state, batches)

    return jax.jit(train, static_argnums=3, donate_argnums=0, out_shardings=(shardings, None))


def make_validate(task: Task):
    """The jitted validation of one batch: (params, model_state, batch, frozen) -> sums.

    Returns terms and metrics as sums and counts; see `added` and `means`.
    """
    def validate(params, model_state, batch, step, frozen_params, frozen_static):
        # A fixed key: noise in a validation loss is the same at every step of a run.
        ctx = Context(task.config, jax.random.key(0, impl=task.prng), step, False,
                      bind(frozen_static, frozen_params), task.dtype, task.constrain)
        terms, metrics, _ = task.model.loss(params, model_state, batch, ctx)
        return terms, metrics

    return jax.jit(validate, static_argnums=5)


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


def _gradients(state, batch, frozen, key, task):
    """Gradients of the objective over the global batch, in microbatches if asked for."""
    def objective(params, batch, key, counts):
        ctx = Context(task.config, key, state.updates, True, frozen, task.dtype, task.constrain)
        terms, metrics, model_state = task.model.loss(params, state.model_state, batch, ctx)
        total = sum(t.weight * t.sum / (t.count if counts is None else counts[name])
                    for name, t in terms.items())
        return total, (terms, metrics, model_state)

    if task.microbatches == 1:
        grads, (terms, metrics, model_state) = jax.grad(objective, has_aux=True)(
            state.params, batch, key, None)
        return grads, means(terms, metrics), model_state

    n = task.microbatches
    if getattr(task.model, 'couples_batch', False):
        raise ValueError(f'{task.model.__name__} compares the examples of a batch with each other, '
                         f'so loop.microbatches={n} would change the loss; set it to 1')
    parts = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
    keys = jax.random.split(key, n)
    # Counts depend on the batch alone, so the compiler drops the forward pass of this first loop.
    counts = jax.lax.map(lambda a: {name: jnp.asarray(t.count, jnp.float32) for name, t in
                                    objective(state.params, *a, None)[1][0].items()},
                         (parts, keys))
    counts = jax.tree.map(jnp.sum, counts)

    def body(total, part_and_key):
        grads, (terms, metrics, model_state) = jax.grad(objective, has_aux=True)(
            state.params, *part_and_key, counts)
        sums = jax.tree.map(jnp.asarray, (terms, metrics))
        return jax.tree.map(jnp.add, total, grads), (*sums, model_state)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, (terms, metrics, model_state) = jax.lax.scan(body, zeros, (parts, keys))
    terms = {name: t._replace(sum=t.sum.sum(), count=counts[name], weight=jnp.max(t.weight))
             for name, t in terms.items()}
    metrics = jax.tree.map(jnp.sum, metrics)
    return grads, means(terms, metrics), jax.tree.map(lambda x: x[-1], model_state)
