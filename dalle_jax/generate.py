"""Captions to pictures with trained runs: the one path used by sample, evaluate and load().

The random numbers of an image depend only on (seed, caption, index), so image 7 of a caption can
be drawn again alone. Batch shapes are fixed and padded, so a program is compiled once.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import runs


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How candidates are drawn.

    Attributes:
      candidates: images drawn per caption.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: only this many most probable tokens are drawn from; 0 is off.
      top_p: only the most probable tokens that together reach this probability; 1 is off.
      seed: with a caption and an index it determines an image.
      batch: images drawn at once, bounding memory.
    """

    candidates: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 64

    def __post_init__(self):
        if self.candidates < 1 or self.batch < 1:
            raise ValueError(f'candidates={self.candidates} and batch={self.batch} must be at '
                             'least 1')
        if self.temperature < 0:
            raise ValueError(f'temperature is {self.temperature}; it cannot be negative')
        if self.top_k < 0:
            raise ValueError(f'top_k is {self.top_k}; give 0 (off) or more')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p is {self.top_p}; it must be in (0, 1]')


class Drawn(NamedTuple):
    """The candidates of one caption.

    Attributes:
      caption: as given.
      images: uint8 [n, S, S, 3].
      ids: int32 [n, h, w], the image tokens.
      logp: float32 [n], log-likelihood of the tokens given the caption, in nats.
      scores: float32 [n], CLIP's similarity of caption and image, or None without a CLIP.
      truncated: the caption had more tokens than the model reads.
    """

    caption: str
    images: np.ndarray
    ids: np.ndarray
    logp: np.ndarray
    scores: np.ndarray | None
    truncated: bool

    def order(self) -> np.ndarray:
        """Indices of the candidates, best first: by CLIP where there is one, else by logp."""
        return np.argsort(-(self.logp if self.scores is None else self.scores), kind='stable')


class Model:
    """A trained run for use in a notebook or script; see `dalle_jax.load`.

    A dVAE run encodes and decodes; a DALL-E run also samples and scores, using the image
    tokenizer it was trained with (`image_run`); a CLIP run (`clip_run`) scores.
    """

    def __init__(self, path: str | Path, clip: str | Path | None = None):
        runs.start_jax()
        self.run = runs.load(path)
        kind = self.run.experiment.model
        self.clip_run = runs.load(clip) if clip else self.run if kind == 'clip' else None
        self._dalle = self.run if kind == 'dalle' else None
        self.image_run = self.run if hasattr(self.run.module, 'decode') else None
        if self._dalle:
            named = self.run.experiment.frozen['image']
            self.image_run = runs.load(runs.named_by(named, self.run.path))
        if self.clip_run and self.clip_run.experiment.model != 'clip':
            raise runs.RunError(f'{clip} is a {self.clip_run.experiment.model} run; name a CLIP '
                                'run to rank with')
        sides = {r.config.image_size for r in (self.clip_run, self.image_run) if r}
        if len(sides) > 1:
            raise runs.RunError(f'{clip} reads images of {self.clip_run.config.image_size} px, but '
                                f'{path} draws {self.image_run.config.image_size} px')
        self.dtype = runs.compute_dtype(self.run.experiment.precision)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [B, S, S, 3] -> int32 tokens [B, h, w]."""
        run = self._need(self.image_run, 'encode images', 'a dVAE or DALL-E run')
        return np.asarray(_encode(run.module, run.config, run.params, _checked(images, run.config)))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """int32 tokens [B, h, w] -> uint8 images [B, S, S, 3]."""
        run = self._need(self.image_run, 'decode tokens', 'a dVAE or DALL-E run')
        ids = np.asarray(ids)
        if ids.ndim != 3 or ids.min() < 0 or ids.max() >= run.config.vocab:
            raise ValueError(f'tokens of shape {ids.shape} in [{ids.min()}, {ids.max()}]; expected '
                             f'[batch, h, w] with values in [0, {run.config.vocab})')
        return np.asarray(_decode(run.module, run.config, run.params, ids))

    def sample(self, captions: Sequence[str], n: int = 1, seed: int = 0, **options
               ) -> list[Drawn]:
        """Draws n candidates for each caption; options are those of `Sampling`."""
        return list(self.draw(captions, Sampling(candidates=n, seed=seed, **options)))

    def score(self, captions: Sequence[str], images: np.ndarray) -> np.ndarray:
        """How well images[i] fits captions[i], float32 [B].

        CLIP's similarity where there is a CLIP run, else DALL-E's log p(image | caption), nats.
        """
        if self.clip_run:
            run = self.clip_run
            text = self._ids(run, captions)[0]
            return np.asarray(_clip_score(run.module, run.config, run.params,
                                          _checked(images, run.config), text))
        run = self._need(self._dalle, 'score images', 'a CLIP or DALL-E run')
        text = self._ids(run, captions)[0]
        return np.asarray(_likelihood(run.module, run.config, run.params, text,
                                      self.encode(images))[1])

    def draw(self, captions: Sequence[str], sampling: Sampling) -> Iterator[Drawn]:
        """Yields the candidates of each caption in order, as soon as they are there.

        Raises:
          ValueError: an empty caption, named by its position, before anything is drawn.
        """
        run = self._need(self._dalle, 'sample', 'a DALL-E run')
        text, truncated = self._ids(run, captions)
        n = sampling.candidates
        rows = max(1, min(sampling.batch // n, len(captions)))  # captions at once
        width = min(n, sampling.batch)  # candidates of a caption at once
        draw = functools.partial(
            _draw, run.module, run.config, self.image_run.module, self.image_run.config, self.dtype,
            sampling.top_k, run.params, self.image_run.params)
        for start in range(0, len(captions), rows):
            chosen = [min(start + i, len(captions) - 1) for i in range(rows)]  # last batch: padded
            parts = []
            for first in range(0, n, width):
                indices = range(first, first + width)
                keys = jnp.stack([image_keys(sampling.seed, captions[c], indices) for c in chosen])
                parts.append(jax.device_get(draw(
                    text[chosen], keys, jnp.float32(sampling.temperature),
                    jnp.float32(sampling.top_p), sampling.top_p < 1)))
            images, ids, logp = (np.concatenate([p[i] for p in parts], axis=1)[:, :n]
                                 for i in range(3))
            for row in range(min(rows, len(captions) - start)):
                caption = captions[start + row]
                scores = None
                if self.clip_run:
                    scores = self.score([caption] * n, images[row])
                yield Drawn(caption, images[row], ids[row], logp[row], scores,
                            bool(truncated[start + row]))

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
        pieces = tokenizer.encode(caption) if caption.strip() else []
        if not pieces:
            raise ValueError(f'caption {i} is empty ({caption!r}); every caption needs a word')
        truncated[i] = len(pieces) > length
        ids[i, :len(pieces)] = pieces[:length]
    return ids, truncated


def image_keys(seed: int, caption: str, indices: Sequence[int]) -> jax.Array:
    """One PRNG key an image: a function of seed, the caption's text and the index."""
    word = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], 'little')
    key = jax.random.fold_in(jax.random.key(seed), word)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(list(indices)))


def to_uint8(images: jax.Array) -> jax.Array:
    """Float images in [0, 1] as uint8, rounded."""
    return jnp.round(images * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 12))
def _draw(dalle, config, tokenizer, tokenizer_config, dtype, top_k, params, tokenizer_params, text,
          keys, temperature, top_p, nucleus):
    """Prefill, the image tokens and the decoder in one program."""
    ids, logp = dalle.generate(params, config, text, keys=keys, temperature=temperature,
                               top_k=top_k, top_p=top_p if nucleus else 1.0, dtype=dtype)
    flat = ids.reshape(-1, *ids.shape[2:])
    images = to_uint8(tokenizer.decode(tokenizer_params, tokenizer_config, flat))
    return images.reshape(*ids.shape[:2], *images.shape[1:]), ids, logp


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(module, config, params, images):
    return module.encode(params, config, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(module, config, params, ids):
    return to_uint8(module.decode(params, config, ids))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _clip_score(module, config, params, images, text):
    return module.score(params, config, images, text)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likelihood(module, config, params, text, ids):
    return module.likelihood(params, config, text, ids)


def _checked(images, config):
    images = np.asarray(images)
    size = config.image_size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(f'images are {images.dtype} {list(images.shape)}; expected uint8 '
                         f'[batch, {size}, {size}, 3]')
    return images
