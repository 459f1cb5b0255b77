"""Stage 1: the discrete VAE that turns an image into a grid of codes.

Ramesh et al. 2021, sec. 2.1 and app. A.

    python -m dalle_jax.train --config experiments/dvae.py:paper,path=DIR --workdir runs/dvae

Variants:
  paper    256 px -> 32x32 codes of 8192, 97.6M parameters, the paper's recipe: batch 512,
           3,000,000 updates, 64 V100 in the paper. path=DIR is a folder of images, or with
           source=tfds a prepared TFDS directory.
  medium, small, tiny    narrower networks, the same recipe.
  scenes   captioned scenes drawn on demand, 60 px -> 10x10 codes of 512; 80 s on 2 CPU
           cores. Expected: 28.7 dB, 99 % of reconstructions right by the oracle.
  folder   a folder of your own images (path=DIR, size=64 by default) with the small recipe.
"""

from experiments import common

from dalle_jax.models import dvae


def get_config(arg=None):
    variant, args = common.parse_arg(
        arg, 'paper', 'medium', 'small', 'tiny', 'scenes', 'folder',
        path='', source='folder', size=0, steps=0, batch=0)
    if variant in ('scenes', 'folder'):
        return _small(variant, args)
    steps = args.steps or 3_000_000
    return common.experiment(
        model='dvae',
        arch=dvae.PRESETS[variant],
        data=common.own_data(args) | dict(
            batch_size=args.batch or 512, crop='stage1', workers=8),
        optimizer=dict(  # app. A.2
            name='adamw', peak_lr=1e-4, schedule='cosine', decay_updates=1_200_000, end_lr=1.25e-6,
            b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4, average_decay=0.999),
        loop=dict(steps=steps, log_every=100, valid_every=5_000, valid_batches=8,
                  snapshot_every=5_000, save_every=5_000),
    )


def _small(variant, args):
    """The recipe of minutes: where it leaves the paper, and why, is said line by line."""
    scenes = variant == 'scenes'
    size = args.size or (60 if scenes else 64)
    steps = args.steps or 1000
    warmup = steps * 7 // 10 // 10 * 10
    arch = dvae.Config(
        image_size=size,
        vocab=512,
        # A patchify stem: convolutions at full resolution would take all of the time.
        patch=3 if scenes else 4, groups=2, widths=(64, 128), blocks_per_group=2,
        post_gain=0.5,  # the paper's 1 / blocks^2 learns too slowly for so few updates
        # The paper's codes start at random and separate over 10^5 updates. Here an autoencoder
        # with a narrow, noisy bottleneck is warmed up first and k-means puts the codes on its
        # latents; from random codes a run of this length uses a tenth of them.
        bottleneck=8, n_init=128, warmup_steps=warmup, noise=0.14,
        codebook_init='kmeans',
        # Squared error and no KL: with the paper's logit-Laplace and beta = 6.6 the pictures are
        # 3 dB worse after so few updates.
        likelihood='mse', kl_weight=0.0,
        temperature_steps=(steps - warmup) * 7 // 10)
    data = dict(batch_size=args.batch or 32, valid_crop='none', workers=1)
    if scenes:  # the tokenizer sees every scene, without captions
        data |= dict(source='scenes', train_split='any', valid_split='combos', train_length=16_384,
                     valid_length=256, crop='window', image_size=36, scenes=common.scenes(size))
    else:
        data |= common.own_data(args) | dict(crop='stage1')
    return common.experiment(
        model='dvae',
        arch=arch,
        data=data,
        optimizer=dict(
            # Muon: twice the progress of AdamW per update on convolution kernels.
            name='muon', muon=r'group_.*kernel', peak_lr=6e-3, schedule='cosine',
            warmup=min(30, steps // 4), decay_updates=steps, end_lr=1e-4, b2=0.95,
            weight_decay=1e-4, decay='kernel', clip=1.0,
            average_decay=0.98),
        loop=dict(steps=steps, log_every=50, valid_every=max(steps // 4, 1), valid_batches=8,
                  snapshot_every=steps // 2, save_every=max(steps // 10, 1), prng='rbg'),
    )
