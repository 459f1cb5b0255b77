"""Judges a DALL-E run, or images, on CUB birds as Ramesh et al. 2021, sec. 3.1 and fig. 9 (b).

    python -m dalle_jax.evaluate --config experiments/eval_cub.py --config.run=runs/dalle \\
        --config.clip=runs/clip-b32 --config.path=DATA/cub \\
        --config.features=pt_inception-2015-12-05-6726825d.pth --workdir runs/eval_cub

A folder of the test set's images, each with its captions beside it (x.jpg and x.txt, one a line);
all captions that differ, 512 candidates of each. The paper reads 56.1 of FID and 2.64 of IS at
radius 0.
"""

from experiments import common


def get_config(arg=None):
    _, args = common.parse_arg(arg, 'cub', candidates=512)
    return common.evaluation(
        source='folder', splits=('all',), crop='center', captions=0, candidates=args.candidates,
        rerank=tuple(2**i for i in range(10) if 2**i <= args.candidates),
        blur=(0.0, 1.0, 2.0, 4.0, 8.0), paper='cub')
