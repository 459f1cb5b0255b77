"""16-bit storage formats, nearest and stochastic rounding (Ramesh et al. 2021, sec. 2.4, app. D).

'1-6-9' has a sign, 6 exponent bits of bias 59 and 9 significand bits; '0-6-10' has no sign and one
more significand bit. Both are as IEEE formats otherwise: exponent 63 is Inf or NaN, exponent 0 is
subnormal. They reach from 2^-67 (2^-68) to just under 16. 'float32', 'bfloat16' and 'float16' go
through the same functions, so that an optimiser does not care.

Everything is elementwise on the words of float32, so XLA fuses a whole update of a stored array
into one loop. Float arithmetic would not do: XLA may drop a pair of conversions that only rounds.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class _Layout(NamedTuple):
    """Bits of each field, the exponent's bias and the dtype that an array is stored in."""

    sign: int
    exponent: int
    significand: int
    bias: int
    dtype: Any


FORMATS = {
    'float32': _Layout(1, 8, 23, 127, jnp.float32),
    'bfloat16': _Layout(1, 8, 7, 127, jnp.bfloat16),
    'float16': _Layout(1, 5, 10, 15, jnp.float16),
    '1-6-9': _Layout(1, 6, 9, 59, jnp.uint16),
    '0-6-10': _Layout(0, 6, 10, 59, jnp.uint16),
}


def storage_dtype(format: str) -> Any:
    """The dtype of an array in this format; ValueError for an unknown format, as everywhere."""
    return _layout(format).dtype


def largest(format: str) -> float:
    """The largest finite value, such as 15.984375 for '1-6-9'."""
    to = _layout(format)
    return math.ldexp(2 - 2.0**-to.significand, 2**to.exponent - 2 - to.bias)


def clamped(x: jax.Array, format: str) -> jax.Array:
    """x with infinities and all else beyond the largest finite value clipped to it; NaN stays.

    app. E.2 clamps the factors of a gradient so, after a sum has overflowed.
    """
    return jnp.clip(x, -largest(format), largest(format))


def encode(x: jax.Array, format: str, bits: jax.Array | None = None) -> jax.Array:
    """Rounds to a storage format.

    Args:
      x: float32. Infinities and NaN are kept; beyond the largest finite value lies infinity.
        Without a sign ('0-6-10') all that is negative becomes 0, except NaN.
      format: key of FORMATS.
      bits: None rounds to nearest, ties to even. Uniform random words, uint32 like x, round up
        with a probability equal to the discarded fraction of the distance between the neighbours
        (resolution 2^-31), so that the expectation is x unless a neighbour is infinite.

    Returns:
      An array like x of storage_dtype(format).

    Raises:
      ValueError: unknown format, or x is not float32.
    """
    to = _layout(format)
    if x.dtype != jnp.float32:
        raise ValueError(f'x is {x.dtype}; encode takes float32, such as x.astype(jnp.float32)')
    if format == 'float32':
        return x
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = word & 0x7fffffff
    nan = magnitude > 0x7f800000
    # |x| = significand * 2^(exponent - 150), also if subnormal.
    exponent = jnp.maximum(magnitude >> 23, 1)
    significand = jnp.where(magnitude >> 23 == 0, magnitude, (magnitude & 0x7fffff) | 0x800000)

    # Below the smallest normal exponent of the format more bits are discarded. A shift by 32 or
    # more is undefined: what exceeds 31 is shifted out first.
    smallest = 128 - to.bias
    discard = 23 - to.significand + smallest - jnp.minimum(exponent, smallest)
    significand >>= jnp.clip(discard, 31, 62) - 31
    discard = jnp.minimum(discard, 31)
    whole = significand >> discard
    fraction = significand << (32 - discard)  # in units of 2^-32
    threshold = jnp.uint32(2**31) - (whole & 1) if bits is None else bits

    # The leading 1 of a normal `whole` adds 1 to the exponent, as does a carry out of rounding.
    code = (jnp.maximum(exponent, smallest) - smallest) << to.significand
    code += whole + (fraction > threshold)
    infinity = (2**to.exponent - 1) << to.significand
    quiet = 1 << (to.significand - 1)
    code = jnp.where(nan, infinity | quiet, jnp.minimum(code, infinity))
    if to.sign:
        code |= (word >> 31) << 15
    else:
        code = jnp.where((word >> 31 == 1) & ~nan, 0, code)
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint16), to.dtype)


def decode(code: jax.Array, format: str) -> jax.Array:
    """The float32 values of an array of storage_dtype(format), exactly."""
    to = _layout(format)
    if to.dtype != jnp.uint16:
        return code.astype(jnp.float32)
    word = code.astype(jnp.uint32)
    magnitude = word & (2**(to.exponent + to.significand) - 1)
    exponent = magnitude >> to.significand
    normal = (magnitude << (23 - to.significand)) + ((127 - to.bias) << 23)
    normal = jnp.where(exponent == 2**to.exponent - 1, normal | 0x7f800000, normal)
    # A subnormal's significand has no leading 1: put at the smallest normal exponent, less that 1.
    subnormal = _as_float(normal + (1 << 23)) - 2.0**(1 - to.bias)
    value = jnp.where(exponent == 0, subnormal, _as_float(normal))
    return jnp.where(word >> 15 == 1, -value, value) if to.sign else value


def random_bits(step: jax.Array, leaf: int, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint32 [*shape], a function of (step, leaf, index in the array) alone.

    A hash, not jax.random: it fuses into the rounding, so no array of random words exists, and
    under jit over a mesh each device computes its own part of the same array.

    Args:
      step: int32 scalar, may be traced.
      leaf: which of the arrays rounded in a step this is.
      shape: of the array.
    """
    key = _mix(_mix(jnp.asarray(step).astype(jnp.uint32)) + jnp.uint32(leaf))
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1:]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    if math.prod(shape) > 2**32:  # the index wraps around
        index += _mix(jax.lax.broadcasted_iota(jnp.uint32, shape, 0))
    return _mix(index + key)


def _mix(word):
    """A bijection of uint32, murmur3's finaliser with the constants of Wellons's 'lowbias32'."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7feb352d)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846ca68b)
    return word ^ (word >> 16)


def _as_float(word):
    return jax.lax.bitcast_convert_type(word, jnp.float32)


def _layout(format):
    if format not in FORMATS:
        raise ValueError(f'format is {format!r}; choose one of {", ".join(FORMATS)}')
    return FORMATS[format]
