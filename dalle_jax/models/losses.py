"""Losses as sums with their denominators, so that replicas and microbatches add up exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Term(NamedTuple):
    """One term of an objective: weight * sum / count, the count taken over the global batch."""

    sum: jax.Array
    count: jax.Array | float
    weight: jax.Array | float = 1.0


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
