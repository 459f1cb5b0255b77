"""A network that finds a caption's words in its image, for FID, KID and IS without Inception.

models/words.py says which paper it follows and what its figures mean.

    python -m dalle_jax.train --config experiments/features.py:scenes --workdir runs/features

Variants:
  scenes   captioned scenes; half a minute on 2 CPU cores. text=RUN names the run whose BPE is
           shared. Expected: of the words of held-out scenes 92 to 95 % are found; 1 to 2 of a scene
           are told wrongly, one of which the picture leaves open.
  folder   a folder of your own images and captions (path=DIR, size=64 by default).
"""

from experiments import common

from dalle_jax.models import words


def get_config(arg=None):
    variant, args = common.parse_arg(
        arg, 'scenes', 'folder', path='', source='folder', text='runs/dalle', size=0, steps=0,
        batch=0)
    scenes = variant == 'scenes'
    size = args.size or (60 if scenes else 64)
    steps = args.steps or 600
    arch = words.Config(image_size=size, patch=3 if scenes else 4,
                        text_length=20 if scenes else 32)
    data = dict(batch_size=args.batch or 32, valid_crop='none', workers=1, bpe_dropout=0.0)
    if scenes:
        data |= dict(source='scenes', train_split='train', valid_split='combos',
                     train_length=65_536, valid_length=512, crop='none', scenes=common.scenes(size))
    else:
        data |= common.own_data(args) | dict(crop='stage2')
    return common.experiment(
        model='words',
        arch=arch,
        text_vocab=128 if scenes else 1024,
        frozen=dict(text=args.text),
        data=data,
        optimizer=dict(
            name='muon', muon=r'group_.*kernel', peak_lr=1.2e-2, schedule='cosine',
            warmup=min(30, steps // 4), decay_updates=steps, end_lr=1e-4, b2=0.98,
            weight_decay=0.01, decay='kernel', clip=1.0, average_decay=0.98),
        loop=dict(steps=steps, log_every=50, valid_every=max(steps // 2, 1), valid_batches=16,
                  snapshot_every=steps // 2, save_every=max(steps // 10, 1), prng='rbg'),
    )
