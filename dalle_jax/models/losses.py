"""Losses as sums with their denominators, so that replicas and microbatches add up exactly."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dalle_jax.models.layers import contract

CHUNK = 128  # positions of every sequence whose logits exist at once


class Term(NamedTuple):
    """One term of an objective: weight * sum / count, the count taken over the global batch."""

    sum: jax.Array
    count: jax.Array | float
    weight: jax.Array | float = 1.0


def exact(dtype: Any) -> Any:
    """For logits and what else has no gradient scale: float32 instead of float16 (Ramesh et al.
    2021, app. D.2), else `dtype`."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood in nats, per position, computed in float32.

    Args:
      logits: [..., V], any float dtype.
      targets: int [...], in [0, V).

    Returns:
      float32 [...].
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def vocabulary_loss(x: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array,
                    dtype: Any, chunk: int = CHUNK) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the cross-entropies of the logits x @ kernel, which never exist as a whole.

    They are made, in float32, for `chunk` positions of all sequences at a time. Where a gradient is
    asked for, it is made of them at once: as the result is a sum, whose cotangent is one number,
    nothing has to be kept or made again for the backward pass.

    Args:
      x: [B, L, d].
      kernel: [d, V].
      targets: int [B, L], in [0, V).
      weights: float32 [B, L]; no gradient is taken with respect to them.
      dtype: of the operands of the matrix products; see `exact`.
      chunk: positions.

    Returns:
      float32 scalars: the sum of weights * cross-entropy in nats, and the sum of the weights of
      those targets that have the largest logit.
    """
    cast = kernel.astype(exact(dtype))
    loss, correct = _by_chunk(lambda x, targets: _scores(_logits(x, cast), targets)[:2], chunk,
                              x, targets)
    return (weights * loss).sum(), (weights * correct).sum()


def _vocabulary_forward(x, kernel, targets, weights, dtype, chunk):
    dtype = exact(dtype)
    cast = kernel.astype(dtype)

    def one(grad_kernel, x, targets, weights):
        logits = _logits(x, cast)
        loss, correct, logsumexp = _scores(logits, targets)
        hit = lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets.reshape(-1, 1)
        # Divided by no count yet: in 16 bits these are far from underflow.
        grad = (jnp.exp(logits - logsumexp) - hit) * weights.reshape(-1, 1)
        grad_x = contract('nv,dv->nd', grad, cast, dtype).reshape(x.shape)
        grad_kernel += contract('nd,nv->dv', x.reshape(-1, x.shape[-1]), grad, dtype)
        return grad_kernel, (loss, correct, grad_x)

    grad_kernel, (loss, correct, grad_x) = _by_chunk(
        one, chunk, x, targets, weights, carry=jnp.zeros(kernel.shape, jnp.float32))
    result = (weights * loss).sum(), (weights * correct).sum()
    return result, (grad_x, grad_kernel, jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype))


def _vocabulary_backward(dtype, chunk, saved, cotangents):
    del dtype, chunk
    grad_x, grad_kernel, like_x, like_kernel = saved
    return ((cotangents[0] * grad_x).astype(like_x.dtype),
            (cotangents[0] * grad_kernel).astype(like_kernel.dtype), None, None)


vocabulary_loss.defvjp(_vocabulary_forward, _vocabulary_backward)


def vocabulary_cross_entropy(x: jax.Array, kernel: jax.Array, targets: jax.Array, dtype: Any,
                             chunk: int = CHUNK) -> jax.Array:
    """What `vocabulary_loss` sums, float32 [B, L]; for looking at, not for training."""
    cast = kernel.astype(exact(dtype))
    return _by_chunk(lambda x, targets: _scores(_logits(x, cast), targets)[0], chunk, x, targets)


def _logits(x, kernel):
    """float32 [B c, V]. As one matrix: over several axes, CPUs transpose it for the gradient."""
    return contract('nd,dv->nv', x.reshape(-1, x.shape[-1]), kernel, kernel.dtype)


def _scores(logits, targets):
    """Cross-entropy and whether it is right, like targets [B, c]; logsumexp [B c, 1]."""
    top = logits.max(axis=-1, keepdims=True)
    logsumexp = jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True)) + top
    picked = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)
    loss, correct = (a.reshape(targets.shape) for a in (logsumexp - picked, picked >= top))
    return loss, correct, logsumexp


def _by_chunk(function, chunk, *arrays, carry=None):
    """function of `chunk` positions of arrays [B, L, ...] at a time, the results put together."""
    length = arrays[0].shape[1]
    if length <= chunk:
        return function(*arrays) if carry is None else function(carry, *arrays)
    pieces = -(-length // chunk)

    def cut(a):  # a whole number of chunks; what the padding yields is dropped or has gradient 0
        a = jnp.pad(a, [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(len(a), pieces, chunk, *a.shape[2:]), 1, 0)

    def joined(a):
        a = jnp.moveaxis(a, 0, 1)
        return a.reshape(len(a), pieces * chunk, *a.shape[3:])[:, :length]

    arrays = tuple(map(cut, arrays))
    if carry is None:
        return jax.tree.map(joined, lax.map(lambda a: function(*a), arrays))
    carry, results = lax.scan(lambda carry, a: function(carry, *a), carry, arrays)
    return carry, jax.tree.map(joined, results)


def logit_laplace(x: jax.Array, mu: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Negative log density of the logit-Laplace distribution on (0, 1), in nats.

    The density of sigmoid(Laplace(mu, b)), so that no mass lies outside the range of a pixel:
    f(x) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))  (Ramesh et al. 2021, app. A.3).

    Args:
      x: values strictly inside (0, 1).
      mu: location in logit space.
      log_scale: ln b.

    Returns:
      -ln f, of the broadcast shape; negative where the density exceeds 1.
    """
    log_x, log_rest = jnp.log(x), jnp.log1p(-x)
    distance = jnp.abs(log_x - log_rest - mu)
    return jnp.log(2.0) + log_scale + log_x + log_rest + distance * jnp.exp(-log_scale)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL divergence of a categorical distribution to the uniform one, in nats.

    Args:
      logits: [..., K], any float dtype.

    Returns:
      float32 [...], ln K minus the entropy, in [0, ln K].
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(log_q) * (log_q + jnp.log(logits.shape[-1])), axis=-1)
