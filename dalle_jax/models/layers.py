"""Declared parameters: plain trees of arrays, and of the logical axis names beside them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def init_module(module: nn.Module, key: jax.Array, *args: Any) -> dict[str, Any]:
    """Initial parameters of a Linen module as a nested dict of arrays without metadata.

    Args:
      module: has no collection but 'params'.
      key: PRNG key.
      *args: what the module is called with; jax.ShapeDtypeStruct will do, as nothing is computed
        but the parameters.
    """
    boxed = module.lazy_init(key, *args)['params']
    # The value itself, not unbox(): that would constrain its sharding if a mesh were in scope.
    return jax.tree.map(lambda leaf: leaf.value if _is_boxed(leaf) else leaf, boxed,
                        is_leaf=_is_boxed)


def module_axes(module: nn.Module, *args: Any) -> dict[str, Any]:
    """Logical axis names of a module's parameters, from shapes alone.

    Returns:
      A tree like init_module's with tuples (str or None, one a dimension) for leaves; all None for
      a parameter declared without `nn.with_logical_partitioning`.
    """
    def names(leaf):
        return tuple(leaf.names) if _is_boxed(leaf) else (None,) * leaf.ndim

    boxed = jax.eval_shape(lambda: module.lazy_init(jax.random.key(0), *args))['params']
    return jax.tree.map(names, boxed, is_leaf=_is_boxed)


@dataclasses.dataclass(frozen=True)
class Param:
    """An array that a model declares: drawn from a normal distribution, or constant with std 0.

    Attributes:
      shape: of the array.
      axes: logical axis name (or None) of each dimension.
      std, mean: of the initial values.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float = 0.0
    mean: float = 0.0

    def init(self, key: jax.Array) -> jax.Array:
        """Initial values, float32."""
        if not self.std:
            return jnp.full(self.shape, self.mean, jnp.float32)  # weakly typed, it compiles again
        return self.mean + self.std * jax.random.normal(key, self.shape)


class Declared(nn.Module):
    """Holds a nested dict of `Param` and computes nothing; a model's functions read its arrays."""

    params: Mapping[str, Any]

    @nn.compact
    def __call__(self):
        for name, entry in self.params.items():
            if isinstance(entry, Param):
                self.param(name, nn.with_logical_partitioning(entry.init, entry.axes))
            else:
                Declared(entry, name=name)()


def dense_params(inputs: int, outputs: int, axes: tuple[str | None, str | None], std: float
                 ) -> dict[str, Param]:
    """Kernel [inputs, outputs] and zero bias [outputs] of `dense`."""
    # A bias over 'embed' is too short to be worth dividing and gathering.
    bias_axis = None if axes[1] == 'embed' else axes[1]
    return {'kernel': Param((inputs, outputs), axes, std), 'bias': Param((outputs,), (bias_axis,))}


def norm_params(width: int) -> dict[str, Param]:
    """Unit gain and zero bias of `layer_norm`."""
    return {'gain': Param((width,), (None,), mean=1.0), 'bias': Param((width,), (None,))}


def stacked(params: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same declarations with a leading axis 'layers', as lax.scan wants them."""
    return jax.tree.map(
        lambda p: dataclasses.replace(p, shape=(layers, *p.shape), axes=('layers', *p.axes)),
        params, is_leaf=lambda p: isinstance(p, Param))


def _aligned(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector with as many dimensions as x, so that no rank is promoted silently."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def dense(x: jax.Array, params: Mapping[str, jax.Array], dtype: Any, transposed: bool = False
          ) -> jax.Array:
    """x [..., inputs] @ kernel + bias, computed and returned in `dtype`.

    Args:
      params: 'bias' and 'kernel', or instead of it 'tiles' of `tiled`.
      transposed: whether the kernel is [outputs, inputs].
    """
    # As one matrix: over several axes, CPUs transpose the operands of the kernel's gradient.
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    if 'tiles' in params:
        rows = tiled_product(rows, params['tiles'], dtype).astype(dtype)
    else:
        kernel = params['kernel'].astype(dtype)
        rows = rows @ (kernel.T if transposed else kernel)
    return (rows + params['bias'].astype(dtype)[None]).reshape(*x.shape[:-1], -1)


def tiled(kernel: jax.Array, rows: int) -> jax.Array:
    """A kernel [..., inputs, outputs] as CPUs read it fastest, to multiply a few rows many times.

    Returns:
      [..., n, inputs, outputs / n]: n groups of columns, each in one piece of memory. A product of
      2 to 8 rows with groups of 64 is 1.2 to 1.7 times as fast as with the kernel, whose columns
      it would collect anew each time; with more rows, or one, it is no faster, and n is 1.
    """
    *lead, inputs, outputs = kernel.shape
    width = 64 if 2 <= rows <= 8 and outputs % 64 == 0 else outputs
    return kernel.reshape(*lead, inputs, outputs // width, width).swapaxes(-3, -2)


def tiled_product(rows: jax.Array, tiles: jax.Array, dtype: Any) -> jax.Array:
    """rows [M, inputs] times the kernel of `tiles`: float32 [M, outputs]."""
    rows = jnp.broadcast_to(rows[None], (len(tiles), *rows.shape))
    groups = contract('nmi,nio->nmo', rows, tiles, dtype)
    return groups.swapaxes(0, 1).reshape(rows.shape[1], -1)


# Recomputed in the backward pass from x, which is kept anyway, so that no other [..., d] array is;
# on CPUs that is faster, too. Where the compiler shares the two computations, nothing is lost.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def layer_norm(x: jax.Array, params: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """Normalises the last axis, then gain and bias; float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * _aligned(params['gain'], x) + _aligned(params['bias'], x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(spec: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """jnp.einsum(spec, a, b) with operands in `dtype` and a float32 result.

    The gradients are computed alike: cotangent and operands in `dtype`, accumulation in float32.
    (Plain einsum with preferred_element_type multiplies a float32 cotangent by a bfloat16 operand,
    which no accelerator does at speed.) Every index occurs in two of the three arrays.
    """
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _contract_forward(spec, a, b, dtype):
    return contract(spec, a, b, dtype), (a, b)


def _contract_backward(spec, dtype, operands, cotangent):
    a, b = operands
    names, out = spec.split('->')
    of_a, of_b = names.split(',')
    return (contract(f'{out},{of_b}->{of_a}', cotangent, b, dtype).astype(a.dtype),
            contract(f'{of_a},{out}->{of_b}', a, cotangent, dtype).astype(b.dtype))


contract.defvjp(_contract_forward, _contract_backward)
