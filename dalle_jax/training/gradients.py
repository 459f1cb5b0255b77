"""Gradients of a step: of all examples at once, in microbatches, or replica by replica."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dalle_jax.models.context import Context
from dalle_jax.training import precision
from dalle_jax.training.optimizer import matches
from dalle_jax.training.partition import path_name

LAYERS = r'(qkv|out|up|down)/kernel$'  # parameters that are used in the dtype of products alone


def gradients(state: Any, batch: Mapping[str, jax.Array], frozen: Mapping[str, Any],
              key: jax.Array, task: Any) -> tuple[Any, Any, tuple[dict, dict], Any]:
    """Gradients of the objective over the global batch.

    Args:
      state: step.State.
      batch: name -> array with the global batch leading.
      frozen: name -> context.Frozen.
      key: of this step.
      task: step.Task.

    Returns:
      the gradients, divided by the gradient scales, for a reducer of replicas with these leading;
      of each resblock with a scale the entries that are not finite; terms and metrics as sums and
      counts; the model's new state.
    """
    def local(params, model_state, values, updates, batch, key, frozen_params, axis=None):
        bound = {role: f._replace(params=frozen_params[role]) for role, f in frozen.items()}
        return _local(params, model_state, values, updates, batch, key, bound, task, axis)

    values = state.scales.value if state.scales else {}
    given = (state.params, state.model_state, values, state.updates, batch, key,
             {role: f.params for role, f in frozen.items()})
    if not task.replicas:
        return local(*given)
    whole, part = PartitionSpec(), PartitionSpec('replica')
    return jax.shard_map(
        functools.partial(local, axis='replica'), mesh=task.partition.mesh, check_vma=False,
        axis_names={'replica'}, in_specs=(whole, whole, whole, whole, part, whole, whole),
        out_specs=(part, whole, whole, whole))(*given)


def _local(params, model_state, values, updates, batch, key, frozen, task, axis):
    """`gradients` of the examples that are here: all of them, or those of a replica."""
    if axis:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))

    def over_replicas(tree, combine):
        return jax.tree.map(lambda x: combine(x, axis), tree) if axis else tree

    def objective(trained, batch, key, counts):
        params, flags = trained
        ctx = Context(task.config, key, updates, True, frozen, task.dtype, task.partition,
                      precision.with_flags(values, flags))
        terms, metrics, new_state = task.model.loss(params, model_state, batch, ctx)
        if counts is None:
            # The mean: replicas' gradients are averaged, and their counts may differ.
            counts = over_replicas({name: t.count for name, t in terms.items()}, jax.lax.pmean)
        total = sum(t.weight * t.sum / counts[name] for name, t in terms.items())
        return total, (terms, metrics, new_state)

    trained = rounded(params, task.dtype), jax.tree.map(jnp.zeros_like, values)
    if task.microbatches == 1:
        (grads, nonfinite), (terms, metrics, new_state) = jax.grad(objective, has_aux=True)(
            trained, batch, key, None)
    else:
        (grads, nonfinite), (terms, metrics, new_state) = _accumulated(
            objective, trained, batch, key, task.microbatches, over_replicas)
    grads = precision.unscaled(grads, values)
    sums = {name: (t.sum, t.count) for name, t in terms.items()}, metrics, nonfinite
    sums, metrics, nonfinite = over_replicas(jax.tree.map(jnp.asarray, sums), jax.lax.psum)
    terms = {name: t._replace(sum=sums[name][0], count=sums[name][1]) for name, t in terms.items()}
    if axis:
        grads = jax.tree.map(lambda g: g[None], grads)
    return grads, nonfinite, (terms, metrics), new_state


def rounded(params: Any, dtype: Any) -> Any:
    """The layers' weights as layers use them, in the dtype of products if that is shorter.

    Then their gradients, which are computed in that dtype, have it too and take half the memory.
    Compilers make these copies in any case, ahead of the loop over layers.
    """
    def one(path, p):
        shorter = jnp.dtype(dtype).itemsize < p.dtype.itemsize
        return p.astype(dtype) if shorter and matches(LAYERS, path_name(path)) else p
    return jax.tree_util.tree_map_with_path(one, params)


def _accumulated(objective, trained, batch, key, n, over_replicas):
    """Gradients, added up in float32, and terms of n microbatches."""
    # Neighbours go to different microbatches, so that a batch's division over devices stays.
    parts = jax.tree.map(lambda x: x.reshape(len(x) // n, n, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, n)
    # Counts depend on the batch alone, so the compiler drops the forward pass of this first loop.
    counts = jax.lax.map(lambda a: {name: jnp.asarray(t.count, jnp.float32) for name, t in
                                    objective(trained, *a, None)[1][0].items()}, (parts, keys))
    counts = jax.tree.map(jnp.sum, counts)
    mean_counts = over_replicas(counts, jax.lax.pmean)

    def body(total, part_and_key):
        grads, (terms, metrics, new_state) = jax.grad(objective, has_aux=True)(
            trained, *part_and_key, mean_counts)
        sums = jax.tree.map(jnp.asarray, (terms, metrics))
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)
        return total, (*sums, new_state)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    grads, (terms, metrics, new_state) = jax.lax.scan(body, zeros, (parts, keys))
    terms = {name: t._replace(sum=t.sum.sum(), count=counts[name], weight=jnp.max(t.weight))
             for name, t in terms.items()}
    metrics = jax.tree.map(jnp.sum, metrics)
    return grads, (terms, metrics, jax.tree.map(lambda x: x[-1], new_state))
