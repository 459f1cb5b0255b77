"""Stage 2: the sparse transformer over text and image tokens.

Ramesh et al. 2021, sec. 2.2 and app. B.

    python -m dalle_jax.train --config experiments/dalle.py:12b,path=DIR --workdir runs/dalle

Variants:
  12b      64 layers, d 3968, 62 heads: the paper's model and recipe (batch 1024, 430,000 updates,
           1024 V100 in the paper). path=DIR is a folder of images with captions, with
           source=tfds a prepared TFDS directory, or with source=tokens what
           `python -m dalle_jax.encode` wrote; dvae=RUN names the trained tokenizer.
           precision=float16 is the paper's, with gradient scales of the resblocks; 'auto' is
           bfloat16 on TPUs and GPUs, which needs none.
  12b_one_gpu  the same model on one GPU of 140 GB: 16-bit parameters too, 24 examples a step.
  5.6b, 2.8b, 1.4b, 1.3b, 0.7b, large, base, small, tiny    the family at other sizes.
  scenes   d 128, 4 layers on captioned scenes; about five minutes on 2 CPU
           cores. Expected: 0.42 nats per image token on new combinations.
  folder   a folder of your own images and captions (path=DIR) with the small recipe.

--config.arch.caption_dropout=0.1 trains without the caption now and then, for `sample --guidance`.
--config.arch.attention and arch.remat choose kernels and what the backward pass recomputes.
--config.mesh.replica, fsdp and tensor divide the devices, --config.compression.rank=896 compresses
what replicas send each other (sec. 2.5). `python -m dalle_jax.plan` tells what fits where.
"""

from experiments import common

from dalle_jax.models import dalle

FAMILY = ('12b', '5.6b', '2.8b', '1.4b', '1.3b', '0.7b', 'large', 'base', 'small', 'tiny')


def get_config(arg=None):
    variant, args = common.parse_arg(
        arg, *FAMILY, '12b_one_gpu', 'scenes', 'folder',
        path='', source='folder', dvae='runs/dvae', steps=0, batch=0, precision='auto')
    if variant in ('scenes', 'folder'):
        return _small(variant, args)
    one_gpu = variant == '12b_one_gpu'
    return common.experiment(
        model='dalle',
        arch=dalle.PRESETS['12b' if one_gpu else variant],
        precision=args.precision,
        text_vocab=16_384,
        frozen=dict(image=args.dvae, text=''),
        data=common.own_data(args) | dict(
            batch_size=args.batch or (24 if one_gpu else 1024), crop='stage2', bpe_dropout=0.1,
            workers=8),
        optimizer=dict(  # app. B.2; halvings at explicit steps, as the plateau rule is not stated
            name='adamw', peak_lr=4.5e-4, schedule='halving', warmup=5_000,
            halve_at=(150_000, 220_000, 290_000, 350_000, 400_000),
            b1=0.9, b2=0.96, eps=1e-8, weight_decay=4.5e-2, decay=r'(qkv|out|up|down)(/kernel)?$',
            clip=4.0, variance_clip=5.0, average_decay=0.99, average_every=25,
            average_memory='host', mean_format='1-6-9', variance_format='0-6-10',  # sec. 2.4
            params_format='bfloat16' if one_gpu else 'float32'),
        loop=dict(steps=args.steps or 430_000, log_every=100, valid_every=5_000, valid_batches=8,
                  snapshot_every=5_000, save_every=1_000),
    )


def _small(variant, args):
    """The recipe of minutes: where it leaves the paper, and why, is said line by line."""
    scenes = variant == 'scenes'
    steps = args.steps or 2500
    arch = dalle.Config(
        depth=4, width=128, heads=4, text_length=20 if scenes else 32, text_vocab=128,
        grid=(10, 10), image_vocab=512, kernel=5,
        std=0.06, embed_std=0.5,  # larger than at full size: a narrow model, a short run
        remat='none')
    data = dict(batch_size=args.batch or 16, valid_crop='none', workers=1)
    if scenes:
        data |= dict(source='scenes', train_split='train', valid_split='combos',
                     train_length=65_536, valid_length=512, crop='none', bpe_dropout=0.0,
                     scenes=common.scenes())
    else:
        data |= common.own_data(args) | dict(crop='stage2', bpe_dropout=0.1)
    return common.experiment(
        model='dalle',
        arch=arch,
        precision=args.precision,
        text_vocab=128 if scenes else 1024,
        frozen=dict(image=args.dvae, text=''),
        data=data,
        optimizer=dict(
            name='muon', muon=r'(body|tail)/.*(qkv|out|up|down)(/kernel)?$', peak_lr=8e-3,
            schedule='cosine', warmup=min(20, steps // 4), decay_updates=steps, end_lr=2.4e-4,
            b2=0.98, weight_decay=0.01, decay=r'(qkv|out|up|down)(/kernel)?$', clip=1.0,
            average_decay=0.98),
        loop=dict(steps=steps, log_every=50, valid_every=steps // 2, valid_batches=16,
                  snapshot_every=steps // 2, save_every=max(steps // 10, 1), prng='rbg'),
    )
