"""DALL-E in JAX: train, sample and evaluate text-to-image models.

    import dalle_jax
    model = dalle_jax.load('runs/dalle', clip='runs/clip')
    drawn = model.sample(['a red circle'], n=8, seed=0)
"""

__version__ = '0.1.0'


def load(path, clip=None, mesh=''):
    """A finished run for use in a notebook or script.

    Args:
      path: the --workdir of a dVAE, DALL-E or CLIP run.
      clip: the --workdir of a CLIP run that scores the samples of a DALL-E run.
      mesh: how the devices of this process are used. '': each has a copy of the parameters, and
        draws its share of the candidates. 'tensor=2': two share a copy, each with half of the heads
        and hidden units. 'fsdp=4': four share one, divided along the width, which takes more
        communication, but need not divide the heads. 'replica=1': one device only. They combine, as
        in 'fsdp=4,tensor=2', and the tokens are the same, up to rounding.

    Returns:
      generate.Model with sample, encode, decode and score, as far as the run can.

    Raises:
      RunError: no run there, or not finished, or this is one of several processes: sampling needs
        one, with all the devices. CheckpointError: nothing usable is saved in it. ValueError: the
        mesh does not fit the devices or the model.
    """
    from dalle_jax.generate import Model

    return Model(path, clip, mesh)
