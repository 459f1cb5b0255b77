"""CLIP, which chooses among the candidates of a caption.

Radford et al. 2021, sec. 2; Ramesh et al. 2021, sec. 2.6.

    python -m dalle_jax.train --config experiments/clip.py:scenes --workdir runs/clip

Variants:
  b32, b16, l14   the published sizes; path=DIR is a folder of images with captions, or with
           source=tfds a prepared TFDS directory; text=RUN names a run whose BPE is shared.
  scenes   a small pair of towers on captioned scenes; 80 s on 2 CPU cores.
           Expected: 96 % of held-out images find their caption among 64.
  folder   a folder of your own images and captions (path=DIR) with the small recipe.
"""

from experiments import common

from dalle_jax.models import clip


def get_config(arg=None):
    variant, args = common.parse_arg(
        arg, 'b32', 'b16', 'l14', 'scenes', 'folder',
        path='', source='folder', text='runs/dalle', size=0, steps=0, batch=0)
    if variant in ('scenes', 'folder'):
        return _small(variant, args)
    steps = args.steps or 400_000
    return common.experiment(
        model='clip',
        arch=clip.PRESETS[variant],
        text_vocab=49_408,
        frozen=dict(text=args.text),
        data=common.own_data(args) | dict(
            batch_size=args.batch or 32_768, crop='stage2', bpe_dropout=0.0,
            workers=8),
        optimizer=dict(  # table 18 of the paper; decay of matrices only, sec. 2.5
            name='adamw', peak_lr=4e-4 if variant == 'l14' else 5e-4, schedule='cosine',
            warmup=2_000, decay_updates=steps, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2,
            decay=r'kernel$|projection$'),
        loop=dict(steps=steps, log_every=100, valid_every=5_000, valid_batches=1,
                  snapshot_every=0, save_every=1_000),
    )


def _small(variant, args):
    """The recipe of minutes, with Muon as in the other small experiments."""
    scenes = variant == 'scenes'
    size = args.size or (60 if scenes else 64)
    steps = args.steps or 400
    arch = clip.Config(
        image_size=size, patch=10 if scenes else 8, image_width=128, image_depth=4, image_heads=4,
        text_length=20 if scenes else 32, text_vocab=128, text_width=64, text_depth=2,
        text_heads=2, embedding=64)
    data = dict(batch_size=args.batch or 64, valid_crop='none', workers=1, bpe_dropout=0.0)
    if scenes:
        data |= dict(source='scenes', train_split='train', valid_split='combos',
                     train_length=65_536, valid_length=512, crop='none', scenes=common.scenes())
    else:
        data |= common.own_data(args) | dict(crop='stage2')
    return common.experiment(
        model='clip',
        arch=arch,
        text_vocab=128 if scenes else 1024,
        frozen=dict(text=args.text),
        data=data,
        optimizer=dict(
            name='muon', muon=r'(body|tail)/.*kernel$', peak_lr=3e-3, schedule='cosine',
            warmup=min(30, steps // 4), decay_updates=steps, end_lr=1e-4, b2=0.98,
            weight_decay=0.01, decay=r'kernel$|projection$', clip=1.0, average_decay=0.98),
        loop=dict(steps=steps, log_every=50, valid_every=steps // 2, valid_batches=4,
                  snapshot_every=0, save_every=max(steps // 10, 1), prng='rbg'),
    )
