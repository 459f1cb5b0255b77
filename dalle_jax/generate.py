"""Captions to pictures with trained runs: the one path used by sample, evaluate and load().

The random numbers of an image depend only on (seed, caption, index), so image 7 of a caption can
be drawn again alone. Batch shapes are fixed and padded, so a program is compiled once.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax import drawing, machine, runs
from dalle_jax.data.records import BadRecord
from dalle_jax.models.context import unconstrained
from dalle_jax.models.sampling import cast_matrices
from dalle_jax.training import partition

@dataclasses.dataclass(frozen=True)
class Sampling:
    """How candidates are drawn.

    Attributes:
      candidates: images drawn per caption.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: only this many most probable tokens are drawn from; 0 is off.
      top_p: only the most probable tokens that together reach this probability; 1 is off.
      seed: with a caption and an index it determines an image.
      batch: images drawn at once, by all devices; 0: as many as fit into the memory, see
        Model.fit. The tokens do not depend on it.
      guidance: s of logits = u + s (c - u), where c are the logits given the caption and u those
        given an empty one. 1 is off, 0 ignores the caption, and more than 1 follows it more
        closely, at the cost of variety (Ho and Salimans 2022, whose weight is s - 1). Doubles work
        and caches. Needs a run trained with arch.caption_dropout, which teaches it u.
      first: index of the first candidate: with first=5 and candidates=1, image 5 is drawn alone.
    """

    candidates: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 0
    guidance: float = 1.0
    first: int = 0

    def __post_init__(self):
        if self.candidates < 1:
            raise ValueError(f'candidates is {self.candidates}; give 1 or more')
        for name in ('temperature', 'top_k', 'batch', 'guidance', 'first'):
            if not 0 <= getattr(self, name) < float('inf'):
                raise ValueError(f'{name} is {getattr(self, name)}; it must be a number from 0 on')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p is {self.top_p}; it must be in (0, 1]')


class Drawn(NamedTuple):
    """The candidates of one caption.

    Attributes:
      caption: as given.
      images: uint8 [n, S, S, 3].
      ids: int32 [n, h, w], the image tokens.
      logp: float32 [n], log-likelihood of the tokens given the caption, in nats, without
        temperature, filters and guidance.
      logp_text: log-likelihood of the caption's tokens as far as they are read, in nats.
      scores: float32 [n], CLIP's similarity of caption and image, or None without a CLIP.
      truncated: the caption had more tokens than the model reads.
      batch: (captions, candidates) drawn at once. The same images come out bit by bit where it
        and the mesh are the same; others round differently.
    """

    caption: str
    images: np.ndarray
    ids: np.ndarray
    logp: np.ndarray
    logp_text: float
    scores: np.ndarray | None
    truncated: bool
    batch: tuple[int, int]

    def order(self) -> np.ndarray:
        """Indices of the candidates, best first: by CLIP where there is one, else by logp."""
        return np.argsort(-(self.logp if self.scores is None else self.scores), kind='stable')


class Model:
    """A trained run for use in a notebook or script; see `dalle_jax.load`.

    A dVAE run encodes and decodes; a DALL-E run also samples and scores, using the image
    tokenizer it was trained with (`image_run`); a CLIP run (`clip_run`) scores.

    Attributes:
      mesh: of the devices. The candidates, and the rows of all other batches, are divided over
        'replica' and 'fsdp'; DALL-E's parameters over 'fsdp' and 'tensor', and the small ones of
        image tokenizer and CLIP not at all.
      fingerprints: kind of model -> runs.fingerprint of its parameters.
    """

    def __init__(self, path: str | Path, clip: str | Path | None = None, mesh: str = ''):
        runs.start_jax()
        if jax.process_count() > 1:
            raise runs.RunError(
                f'{path}: this is one of {jax.process_count()} processes, and samples are drawn by '
                'one process with its devices; start one without --distributed on each host, and '
                'give them other captions, or another --first')
        self.mesh, self.fingerprints = mesh_of(mesh), {}
        self._constrain = partition.Partitioner(self.mesh) if self.mesh.size > 1 else unconstrained
        self._ways = drawing.batch_ways(self.mesh)
        self.run = self._load(path)
        kind = self.run.experiment.model
        self.clip_run = self._load(clip) if clip else self.run if kind == 'clip' else None
        self._dalle = self.run if kind == 'dalle' else None
        self.image_run = self.run if hasattr(self.run.module, 'decode') else None
        if self._dalle:
            named = self.run.experiment.frozen.get('image')
            if not named:  # it was trained on codes
                raise runs.RunError(f'{path} names no image tokenizer that decodes its tokens; run '
                                    'its train command again with --config.frozen.image=RUN')
            self.image_run = self._load(runs.named_by(named, self.run.path))
        if self.clip_run and self.clip_run.experiment.model != 'clip':
            raise runs.RunError(f'{clip} is a {self.clip_run.experiment.model} run; name a CLIP '
                                'run to rank with')
        self.dtype = machine.compute_dtype(self.run.experiment.precision)

    def _load(self, path):
        """A run whose parameters are where the mesh has them."""
        def place(module, config):
            tensor = self.mesh.shape['tensor']
            if not hasattr(module, 'generate') or self.mesh.size == self.mesh.shape['replica']:
                return partition.replicated(self.mesh)
            if config.heads % tensor:
                some = [n for n in range(1, config.heads + 1) if config.heads % n == 0]
                raise ValueError(f'tensor={tensor} does not divide the {config.heads} heads of '
                                 f'{path}; {", ".join(map(str, some))} do')
            shapes = jax.eval_shape(lambda: module.init(config, jax.random.key(0))[0])
            return partition.Partitioner(self.mesh).shardings(module.axes(config), shapes)

        run = runs.load(path, place)
        self.fingerprints[run.experiment.model] = runs.fingerprint(run.params)
        if hasattr(run.module, 'generate'):
            cast_matrices(run.params, machine.compute_dtype(run.experiment.precision))
        return run

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [B, S, S, 3] -> int32 tokens [B, h, w]."""
        run = self._need(self.image_run, 'encode images', 'a dVAE or DALL-E run')
        return self._of_images(drawing.encode, run, _checked(images, run.config))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """int32 tokens [B, h, w] -> uint8 images [B, S, S, 3]."""
        run = self._need(self.image_run, 'decode tokens', 'a dVAE or DALL-E run')
        ids = np.asarray(ids)
        if ids.ndim != 3 or ids.min() < 0 or ids.max() >= run.config.vocab:
            raise ValueError(f'tokens of shape {ids.shape} in [{ids.min()}, {ids.max()}]; expected '
                             f'[batch, h, w] with values in [0, {run.config.vocab})')
        return self._of_images(drawing.decode, run, ids)

    def sample(self, captions: Sequence[str], n: int = 1, seed: int = 0, *,
               image: np.ndarray | None = None, rows: int = 0, columns: int = 0, **options
               ) -> list[Drawn]:
        """Draws n candidates for each caption.

        image, rows and columns are an image prompt, see `draw`; options are those of `Sampling`.
        """
        sampling = Sampling(candidates=n, seed=seed, **options)
        return list(self.draw(captions, sampling, image, rows, columns))

    def score(self, captions: Sequence[str], images: np.ndarray) -> np.ndarray:
        """How well images[i] fits captions[i], float32 [B].

        CLIP's similarity where there is a CLIP run, else DALL-E's log p(image | caption), nats.
        Images of another size than the CLIP's are resized as images.crop_clip does.
        """
        run = self._need(self.clip_run or self._dalle, 'score images', 'a CLIP or DALL-E run')
        images = np.asarray(images)
        if len(captions) != len(images):
            raise ValueError(f'{len(captions)} captions and {len(images)} images; give one for '
                             'each')
        if run is self.clip_run:
            return self._similarities(captions, images[:, None])[:, 0]
        return self._likelihoods(captions, images)[:, 1]

    def losses(self, captions: Sequence[str], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nats of the tokens of each caption and, given it, of its image; and how many they are.

        Captions have as many tokens as training counts, see arch.pads.

        Returns:
          float64 [B, 2], int [B, 2].
        """
        run = self._need(self._dalle, 'tell the losses of images', 'a DALL-E run')
        text = self._ids(run, captions)[0]
        counts = np.stack([np.asarray(run.module.text_targets(run.config, text)).sum(axis=1),
                           np.full(len(text), math.prod(run.config.grid))], axis=1).astype(int)
        return -self._likelihoods(captions, images).astype(np.float64), counts

    def _likelihoods(self, captions, images):
        run = self._dalle
        function = functools.partial(drawing.likelihood, run.module, run.config, self._constrain,
                                     self.dtype, run.params)
        return drawing.in_batches(function, self._ways, self.encode(images),
                                  self._ids(run, captions)[0])

    def _bound(self, function, run):
        """A function of drawing.py as one of rows, whose number self._ways divides."""
        return functools.partial(function, run.module, run.config, self._constrain, run.params)

    def _of_images(self, function, run, rows):
        """What an image tokenizer makes of any number of rows, in pieces that fit the memory."""
        return drawing.in_batches(self._bound(function, run), self._ways, rows,
                                  at_once=drawing.decoded_at_once(run.config, len(rows)))

    def _similarities(self, captions, images):
        """CLIP's similarity of captions [C] and images uint8 [C, N, S, S, 3], float32 [C, N]."""
        run = self.clip_run
        text, shown = self._ids(run, captions)[0], images.reshape(-1, *images.shape[2:])
        of_text, of_image = (
            drawing.in_batches(self._bound(embed, run), self._ways, rows)
            for embed, rows in ((drawing.embed_text, text),
                                (drawing.embed_image, _as_seen(shown, run.config))))
        return (of_text[:, None] * of_image.reshape(*images.shape[:2], -1)).sum(axis=-1)

    def draw(self, captions: Sequence[str], sampling: Sampling, image: np.ndarray | None = None,
             rows: int = 0, columns: int = 0, *, start: int = 0, firsts: Sequence[int] = (),
             progress: Callable[[int], None] = lambda images: None) -> Iterator[Drawn]:
        """The candidates of each caption in order, as soon as they are there.

        Args:
          captions: any number of them.
          sampling: how they are drawn.
          image: an image prompt, uint8 [S, S, 3], which all images start from, or None.
          rows, columns: the top rows and the left columns of the prompt's tokens are kept, and the
            rectangle that they leave at the bottom right is drawn.
          start: captions before this one are left out; the others are drawn in the same batches,
            hence equal bit by bit.
          firsts: of each caption the index of its first candidate, in place of sampling.first.
          progress: is told the number of images of each batch, when it is drawn.

        Raises:
          ValueError: an empty caption, named by its position, or options that the run does not
            allow; at once, before anything is drawn.
        """
        run = self._need(self._dalle, 'sample', 'a DALL-E run')
        text, truncated = self._ids(run, captions)
        if sampling.top_k > run.config.image_vocab:
            raise ValueError(f'top_k is {sampling.top_k}, and the image vocabulary has '
                             f'{run.config.image_vocab} tokens; give fewer, or 0 (off)')
        if sampling.guidance != 1 and not run.config.caption_dropout:
            raise ValueError(f'guidance is {sampling.guidance}, and {run.path} was trained with '
                             'arch.caption_dropout 0, so it has never seen an empty caption; give '
                             'guidance 1, or train with --config.arch.caption_dropout=0.1')
        codes = self._prompt(image, rows, columns)
        sampling = self.fit(sampling, len(captions))
        draw = functools.partial(
            drawing.draw, run.params, self.image_run.params, image=codes,
            temperature=jnp.float32(sampling.temperature), top_p=jnp.float32(sampling.top_p),
            guidance=jnp.float32(sampling.guidance), dalle=run.module, config=run.config,
            tokenizer=self.image_run.module, tokenizer_config=self.image_run.config,
            dtype=self.dtype, top_k=sampling.top_k, nucleus=sampling.top_p < 1,
            guided=sampling.guidance != 1, keep=(rows, columns), constrain=self._constrain)
        firsts = firsts or [sampling.first] * len(captions)
        return self._drawn(draw, captions, text, truncated, sampling, start, firsts, progress)

    def _drawn(self, draw, captions, text, truncated, sampling, start, firsts, progress):
        n, total = sampling.candidates, len(captions)
        shape = rows, width = drawing.batch_shape(sampling.batch, total, n)
        count, pieces, each = drawing.division(rows, width, self._ways)

        def wanted_of(a):  # the mesh may need more captions and candidates
            return a.reshape(count, pieces * each, *a.shape[2:])[:rows, :width]

        for begin in range(start // rows * rows, total, rows):
            chosen = [min(begin + i, total - 1) for i in range(count)]  # the last batch is padded
            wanted = range(max(start - begin, 0), min(rows, total - begin))
            if not wanted:
                return
            parts = []
            for first in range(0, n, width):
                keys = jnp.stack([
                    image_keys(sampling.seed, captions[c],
                               range(firsts[c] + first, firsts[c] + first + pieces * each))
                    for c in chosen])
                *part, logp_text = jax.device_get(draw(
                    text[chosen].repeat(pieces, axis=0), keys.reshape(count * pieces, each)))
                parts.append([wanted_of(a) for a in part])
                progress(len(wanted) * (min(first + width, n) - first))
            images, ids, logp = (np.concatenate(part, axis=1)[:, :n] for part in zip(*parts))
            scores = [None] * rows
            if self.clip_run:
                scores = self._similarities([captions[c] for c in chosen[:rows]], images)
            for row in wanted:
                yield Drawn(captions[begin + row], images[row], ids[row], logp[row],
                            float(logp_text[row * pieces]), scores[row],
                            bool(truncated[begin + row]), shape)

    def fit(self, sampling: Sampling, captions: int) -> Sampling:
        """`sampling` with `batch` filled in where it is 0: the largest power of two that fits.

        It says so where the candidates of a caption have to be drawn in parts.
        """
        if sampling.batch:
            return sampling
        run = self._need(self._dalle, 'sample', 'a DALL-E run')
        return dataclasses.replace(sampling, batch=drawing.images_at_once(
            run, self.image_run, captions, sampling.candidates, self.dtype, sampling.guidance != 1,
            self.mesh))

    def _prompt(self, image, rows, columns):
        """Codes int32 [R, C] of an image prompt, or None without one."""
        height, width = self.run.config.grid
        if image is None and not rows and not columns:
            return None
        if image is None:
            raise ValueError(f'rows={rows} and columns={columns} say what is kept of an image '
                             'prompt, and there is none')
        if not (0 <= rows < height and 0 <= columns < width and rows + columns):
            raise ValueError(f'rows={rows} and columns={columns} of an image prompt of {height} x '
                             f'{width} tokens cannot be kept; give rows up to {height - 1}, '
                             f'columns up to {width - 1}, and not 0 for both')
        return self.encode(np.asarray(image)[None])[0]

    def _ids(self, run, captions):
        length = run.module.batch_spec(run.config, {})['text'].shape[0]
        return encode_captions(run.tokenizer, captions, length)

    def _need(self, run, what, which):
        if run is None:
            raise ValueError(f'{self.run.path} is a {self.run.experiment.model} run, which cannot '
                             f'{what}; load {which}')
        return run


def encode_captions(tokenizer, captions: Sequence[str], length: int
                    ) -> tuple[np.ndarray, np.ndarray]:
    """BPE ids int32 [C, length], zero-padded, and bool [C]: the caption was cut at the limit.

    Raises:
      ValueError: no captions, or an empty one, named by its position.
    """
    if isinstance(captions, str):
        raise ValueError(f'captions is one string, {captions!r}; give a list of captions')
    if not captions:
        raise ValueError('there are no captions; give at least one')
    ids, truncated = np.zeros((len(captions), length), np.int32), np.zeros(len(captions), bool)
    for i, caption in enumerate(captions):
        try:
            pieces = tokenizer.encode(caption)
        except BadRecord:
            raise ValueError(f'caption {i} is empty ({caption!r}); every caption needs a word'
                             ) from None
        truncated[i] = len(pieces) > length
        ids[i, :len(pieces)] = pieces[:length]
    return ids, truncated


def image_keys(seed: int, caption: str, indices: Sequence[int]) -> jax.Array:
    """One PRNG key an image: a function of seed, the caption's text and the index."""
    word = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], 'little')
    key = jax.random.fold_in(jax.random.key(seed), word)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(list(indices)))


def mesh_of(text: str) -> Mesh:
    """The mesh of a text such as 'tensor=2': by default copies on all devices of this process, or
    on as many of the first ones as `replica` says."""
    config = partition.parse_mesh(text, partition.MeshConfig(replica=-1, fsdp=1))
    extents = [getattr(config, axis) for axis in partition.AXES]
    devices = jax.local_devices()
    return partition.make_mesh(config, devices if -1 in extents else devices[:math.prod(extents)])


def _checked(images, config):
    images = np.asarray(images)
    size = config.image_size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(f'images are {images.dtype} {list(images.shape)}; expected uint8 '
                         f'[batch, {size}, {size}, 3]')
    return images


def _as_seen(images, config):
    """uint8 images [B, H, W, 3] as a CLIP reads them, [B, S, S, 3]."""
    from dalle_jax.data.images import crop_clip

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f'images are {images.dtype} {list(images.shape)}; expected uint8 '
                         '[batch, height, width, 3]')
    if images.shape[1:3] == (config.image_size, config.image_size):
        return images
    with ThreadPoolExecutor() as pool:
        return np.stack([*pool.map(lambda image: crop_clip(image, config.image_size), images)])
