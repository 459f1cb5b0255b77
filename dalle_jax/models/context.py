"""What a model's functions receive besides parameters and a batch.

A model is a module of this package that exports

    Config, PRESETS                                      frozen dataclass, named sizes
    init(config, key) -> params, model_state             float32 arrays; model_state has no gradient
    axes(config) -> tree like params                     logical axis names, one a dimension
    batch_spec(config, frozen) -> name: ShapeDtypeStruct of one example
    flops(config) -> model FLOPs of one example, forward; a training step has three times as many
    loss(params, model_state, batch, ctx) -> terms, metrics, model_state
    snapshot(params, model_state, batch, ctx) -> arrays for the report

and nothing else is needed to train it: there is no base class and no registry. One that is only
used, with published weights, has neither flops nor loss nor snapshot. One that can be trained in
float16 also exports

    branches(config) -> tree of shapes                   of the resblocks' gradient scales, at the
                                                         places of the branches in params
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Frozen(NamedTuple):
    """A trained model that another one uses without training it, such as the image tokenizer."""

    module: ModuleType
    config: Any
    params: Any


class Unconstrained:
    """Context.constrain where there is no mesh: logical axes say nothing."""

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        del axes
        return x

    def divide(self, function: Callable, axes: tuple[str | None, ...], whole: Any = None
               ) -> Callable:
        del axes
        return function if whole is None else functools.partial(function, whole)


unconstrained = Unconstrained()


@dataclasses.dataclass(frozen=True)
class Context:
    """The surroundings of one call of a model's function.

    Attributes:
      config: the model's own Config.
      key: PRNG key of this step (and microbatch); None where nothing random happens.
      step: int32 scalar, updates applied so far; drives the model's own schedules. May be traced.
      train: whether gradients are taken; a Python bool, static under jit.
      frozen: name -> Frozen, such as 'image' for the tokenizer. Params may be traced.
      dtype: what matrix products and convolutions compute in; parameters, the residual stream,
        softmax and losses stay float32.
      constrain: (array, logical axes) -> array, pins an activation's sharding on the mesh. Its
        divide(function, logical axes, whole=None) -> function runs it on each device's part of such
        arrays, which is how kernels must be called; behind `whole`, a tree of arrays that all need
        undivided, if there is one.
      scales: like branches(config), scaling.Scale of each resblock, or None: see scaling.py.
    """

    config: Any
    key: jax.Array | None = None
    step: jax.Array | int = 0
    train: bool = False
    frozen: Mapping[str, Frozen] = dataclasses.field(default_factory=dict)
    dtype: Any = jnp.float32
    constrain: Any = unconstrained
    scales: Any = None
