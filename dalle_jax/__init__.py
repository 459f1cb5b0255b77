"""DALL-E in JAX: train, sample and evaluate text-to-image models.

    import dalle_jax
    model = dalle_jax.load('runs/dalle', clip='runs/clip')
    drawn = model.sample(['a red circle'], n=8, seed=0)
"""

__version__ = '0.1.0'


def load(path, clip=None):
    """A finished run for use in a notebook or script.

    Args:
      path: the --workdir of a dVAE, DALL-E or CLIP run.
      clip: the --workdir of a CLIP run that scores the samples of a DALL-E run.

    Returns:
      generate.Model with sample, encode, decode and score, as far as the run can.

    Raises:
      RunError: no run there, or not finished. CheckpointError: nothing usable is saved in it.
    """
    from dalle_jax.generate import Model

    return Model(path, clip)
