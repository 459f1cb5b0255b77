"""Judges a DALL-E run.

    python -m dalle_jax.evaluate --config experiments/evaluate.py:scenes --workdir runs/eval

Variants:
  scenes   256 captions of scenes and 256 of shape-colour pairs never trained on, best of 8 by the
           CLIP, judged by the oracle; about a minute on 2 CPU cores.
"""

from experiments import common
from experiments.common import ConfigDict


def get_config(arg=None):
    _, args = common.parse_arg(arg, 'scenes', run='runs/dalle', clip='runs/clip')
    return ConfigDict(dict(
        run=args.run, clip=args.clip, captions=256, candidates=8,
        temperature=0.7,  # below 1 as for fig. 2 of the paper: a small model's tail is wrong
        top_k=0, top_p=1.0, seed=0, batch=256, images=400, lookup_images=2048))
