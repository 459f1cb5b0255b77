"""Half-cosine schedules of the model's own quantities, as functions of the update."""

import jax
import jax.numpy as jnp


def half_cosine(step: jax.Array | int, start: float, end: float, steps: int) -> jax.Array:
    """Half a cosine period from `start` to `end` over `steps` updates, `end` thereafter.

    Ramesh et al. 2021, app. A.2 calls its three schedules of the dVAE "cosine" and does not say
    whether half or a quarter of a period is meant; half is flat at both ends.

    Args:
      step: updates applied so far; before 0 the value is `start`. May be traced.
      steps: length; with 0 the value is `end` from the first update on.

    Returns:
      float32 scalar.
    """
    if steps < 1:
        return jnp.where(jnp.asarray(step) < 0, start, end).astype(jnp.float32)
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
    return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
