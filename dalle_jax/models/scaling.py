"""Gradient scaling of a resblock, for 16-bit activations (Ramesh et al. 2021, fig. 4 and app. D).

The residual stream is float32 both ways. On its way into a branch the gradient is multiplied by the
branch's own scale and rounded to the branch's 16 bits; where it leaves the branch it is divided by
the scale again. What is not finite is replaced by 0 at both places: one branch's overflow must
not reach those before it, whose scales would fall for nothing.

    forward    x ---- enter ---- layernorm ---- f in 16 bits ---- leave ---- + x
    backward   unscale, filter                              scale, filter, round

A branch's parameters are used through `parameters`, which counts what is not finite in their
gradients as the gradient of a flag: that costs nothing inside a scan's backward pass. These
gradients stay multiplied by the scale: those of 16-bit parameters have 16 bits, too, and whoever
uses them divides in float32 (training/precision.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Scale(NamedTuple):
    """Of one branch, or stacked of several.

    Attributes:
      value: float32, multiplies the gradient.
      flag: float32 zero, whose gradient counts the entries of the branch's parameters' gradients
        that are not finite.
    """

    value: jax.Array
    flag: jax.Array


def enter(x: jax.Array, scale: Scale | None) -> jax.Array:
    """x; its gradient is unscaled and filtered. None: the identity."""
    return x if scale is None else _enter(x, scale.value)


def leave(y: jax.Array, scale: Scale | None) -> jax.Array:
    """y in float32; its gradient is scaled, filtered and rounded to y's dtype."""
    return y.astype(jnp.float32) if scale is None else _leave(y, scale.value)


def parameters(params: Any, scale: Scale | None) -> Any:
    """params; the flag's gradient counts what is not finite in theirs, which stay scaled."""
    if scale is None:
        return params
    return jax.tree.map(lambda p: _parameter(p, scale.flag), params)


def _finite(gradient):
    return jnp.where(jnp.isfinite(gradient), gradient, 0)


@jax.custom_vjp
def _enter(x, scale):
    del scale
    return x


def _enter_backward(scale, gradient):
    return _finite(gradient / scale), None


_enter.defvjp(lambda x, scale: (x, scale), _enter_backward)


@jax.custom_vjp
def _leave(y, scale):
    del scale
    return y.astype(jnp.float32)


def _leave_backward(saved, gradient):
    scale, like = saved
    # Not filtered behind the rounding: what 16 bits cannot hold must be counted in this branch.
    return _finite(gradient * scale).astype(like.dtype), None


_leave.defvjp(lambda y, scale: (_leave(y, scale), (scale, jnp.zeros((), y.dtype))),
              _leave_backward)


@jax.custom_vjp
def _parameter(p, flag):
    del flag
    return p


def _parameter_backward(_, gradient):
    return gradient, jnp.sum(~jnp.isfinite(gradient), dtype=jnp.float32)


_parameter.defvjp(lambda p, flag: (p, None), _parameter_backward)
