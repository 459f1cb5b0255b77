"""Judges a DALL-E run, or images, on MS-COCO as Ramesh et al. 2021, sec. 3.1 and fig. 9 (a), (c).

    python -m dalle_jax.evaluate --config experiments/eval_coco.py --config.run=runs/dalle \\
        --config.clip=runs/clip-b32 --config.path=DATA/coco_captions/2014/1.1.0 \\
        --config.features=pt_inception-2015-12-05-6726825d.pth --workdir runs/eval_coco

30,000 captions of the validation set, 512 candidates of each, which CLIP reranks; FID and IS after
blurs of radius 0, 1, 2, 4 and 8, and for the best of 1 to 512. (TFDS divides the 40,504 images of
the validation set of 2014 into val, test and restval.) With --config.images=DIR in place
of --config.run the images in a folder or .npz are judged. The paper has FID 28.4 and IS 17.9
at radius 0; --config.exclude=FILE leaves out images that were trained on (its dashed lines).

Drawing 15 million images is the work: one candidate of each caption
(--config experiments/eval_coco.py:candidates=1) is 512 times less, and gives the points N = 1.
"""

from experiments import common


def get_config(arg=None):
    _, args = common.parse_arg(arg, 'coco', captions=30_000, candidates=512)
    return common.evaluation(
        source='tfds', splits=('val+test+restval',), crop='center', captions=args.captions,
        candidates=args.candidates,
        rerank=tuple(2**i for i in range(10) if 2**i <= args.candidates),
        blur=(0.0, 1.0, 2.0, 4.0, 8.0), paper='coco')
