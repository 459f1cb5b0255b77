"""The settings of an evaluation."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is judged, beside what, and how.

    Attributes:
      run: directory of a DALL-E run that draws; '' where `images` are given.
      clip: directory of the CLIP run that chooses among candidates; '': the likelihood does. ''
        where images are given.
      judge: directory of another CLIP run, for the CLIP score; '': that of `clip`.
      images: folder or .npz of images that are judged in place of a run's, see evaluation/data.py.
      source, path: where captions and real images are from, as in an experiment's data; 'scenes'
        takes the scenes of the run. '' where images are given and compared with a file of
        statistics: there are none.
      splits: of the source, judged one by one.
      crop: how real images are brought to the size of those drawn: 'center' or 'none'.
      exclude: file with names of records that are left out, one a line, such as images that were
        trained on (Ramesh et al. 2021, sec. 3.1); '': none. Names are those in captions_SPLIT.json
        before the '#'.
      captions: how many of each split; 0: all that differ.
      reference: 'pairs', the images of the captions; or a statistics file of pytorch-fid, which is
        compared with unblurred images.
      candidates, temperature, top_k, top_p, guidance, seed, batch: see generate.Sampling.
      rerank: numbers of candidates N of which the best is judged, besides all `candidates`.
      blur: radii in pixels.
      features: what FID, IS and KID look through: the file of the published Inception weights, or
        the directory of a run of models/words.py; '': they are left out.
      resize: how images are brought to Inception's size, see metrics/resize.py.
      feature_batch: images at once in that network.
      score_splits: parts of the Inception Score.
      kid_subsets, kid_size: of KID.
      mesh: how the devices are used, such as 'tensor=2', see dalle_jax.load.
      losses: whether the held-out losses of captions and real images are measured.
      paper: 'coco' or 'cub' draws the paper's own points into the report's figures.
      reconstructions, lookup_images: of scenes: images encoded and decoded, and training images of
        the k-means lookup beside them; 0 leaves it out.

    Raises:
      ValueError: values that cannot be, or that contradict each other.
    """

    run: str = ''
    clip: str = ''
    judge: str = ''
    images: str = ''
    source: str = 'scenes'
    path: str = ''
    splits: tuple[str, ...] = ('combos', 'pairs')
    crop: str = 'none'
    exclude: str = ''
    captions: int = 256
    reference: str = 'pairs'
    candidates: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    seed: int = 0
    batch: int = 0
    rerank: tuple[int, ...] = (1,)
    blur: tuple[float, ...] = (0,)
    features: str = ''
    resize: str = 'tensorflow'
    feature_batch: int = 32
    score_splits: int = 10
    kid_subsets: int = 100
    kid_size: int = 1000
    mesh: str = ''
    losses: bool = True
    paper: str = ''
    reconstructions: int = 0
    lookup_images: int = 2048

    def __post_init__(self):
        def check(key, ok, allowed):
            if not ok:
                raise ValueError(f'{key} is {getattr(self, key)!r}; it must be {allowed}')

        check('run', bool(self.run) != bool(self.images),
              'the directory of a DALL-E run, unless images names images to judge instead')
        check('clip', not self.clip or bool(self.run), "'' where images are given, among which "
              'nothing is chosen; judge names the CLIP of the score')
        check('source', self.source in ('scenes', 'folder', 'tfds', ''),
              "scenes, folder, tfds or ''")
        check('source', bool(self.source) or self.images and self.reference != 'pairs',
              'scenes, folder or tfds, unless images are given and reference names a file')
        check('path', bool(self.path) == (self.source in ('folder', 'tfds')),
              "the directory that the source reads, and '' for scenes")
        check('source', not self.images or self.source != 'scenes',
              "folder, tfds or '' where images are given: scenes are those of a run")
        check('crop', self.crop in ('center', 'none'), "'center' or 'none'")
        check('splits', bool(self.splits) and (not self.images or len(self.splits) == 1),
              'the names of splits; one where images are given')
        check('reference', bool(self.reference), "'pairs', or a file of statistics")
        check('captions', self.captions > 0 or not self.captions and self.source != 'scenes',
              'positive; or 0, all that differ, where the source is not scenes, which never end')
        check('rerank', all(1 <= n <= self.candidates for n in self.rerank),
              f'numbers from 1 to candidates, which is {self.candidates}')
        check('blur', all(radius >= 0 for radius in self.blur), 'radii from 0 on')
        check('paper', self.paper in ('', 'coco', 'cub'), "'coco', 'cub' or ''")
        check('feature_batch', self.feature_batch > 0, 'positive')
        check('score_splits', self.score_splits > 0, 'positive')
        check('kid_subsets', self.kid_subsets > 0 and self.kid_size > 1, 'positive')

    @property
    def sampling(self) -> Any:
        """As a generate.Sampling."""
        from dalle_jax.generate import Sampling

        return Sampling(self.candidates, self.temperature, self.top_k, self.top_p, self.seed,
                        self.batch, self.guidance)

    @property
    def conditions(self) -> dict[int, list[float]]:
        """N -> radii at which the best of N are measured: 0, and for the largest N all of them."""
        found = {n: [0] for n in sorted({*self.rerank, self.candidates})} if self.run else {1: [0]}
        found[max(found)] += sorted({*self.blur} - {0})
        return found
