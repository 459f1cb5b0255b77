"""Judges a DALL-E run on scenes.

    python -m dalle_jax.evaluate --config experiments/evaluate.py:scenes --workdir runs/eval

Variants:
  scenes   256 captions of scenes and 256 of shape-colour pairs never trained on, best of 8 by the
           CLIP, judged by the oracle and by the features of a word classifier; about a minute on
           2 CPU cores.

Arguments: run, clip, features: directories.
"""

from experiments import common


def get_config(arg=None):
    _, args = common.parse_arg(arg, 'scenes', run='runs/dalle', clip='runs/clip',
                               features='runs/features')
    return common.evaluation(
        run=args.run, clip=args.clip, features=args.features, source='scenes',
        splits=('combos', 'pairs'), captions=256, candidates=8, batch=256, rerank=(1, 2, 4),
        temperature=0.7,  # below 1 as for fig. 2 of the paper: a small model's tail is wrong
        blur=(0.0, 1.0, 2.0), reconstructions=400, kid_size=100)
