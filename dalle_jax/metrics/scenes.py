"""What evaluation means on scenes: does the picture show what the caption says, by the oracle."""

from collections.abc import Sequence

import jax
import numpy as np

from dalle_jax.data.scenes import SceneConfig
from dalle_jax.data.scenes_oracle import judge
from dalle_jax.models.codebook import lookup_baseline

ATTRIBUTES = ('count', 'background', 'colour', 'shape', 'size', 'relation')


def judge_candidates(config: SceneConfig, images: np.ndarray, captions: Sequence[str]
                     ) -> dict[str, np.ndarray]:
    """The oracle's verdicts on candidates.

    Args:
      images: uint8 [C, N, S, S, 3].
      captions: C of them.

    Returns:
      attribute -> bool [C, N]; 'all' is true where every attribute is right.
    """
    c, n = images.shape[:2]
    verdicts = judge(config, images.reshape(-1, *images.shape[2:]),
                     [caption for caption in captions for _ in range(n)])
    return {name: verdicts[name].reshape(c, n) for name in (*ATTRIBUTES, 'all')}


def accuracies(verdicts: dict[str, np.ndarray], scores: np.ndarray) -> dict[str, float]:
    """Shares of captions that are entirely right.

    Args:
      verdicts: of `judge_candidates`.
      scores: [C, N]; of each caption the candidate with the highest score is chosen.

    Returns:
      accuracy_1: of a single sample (mean over all N, which is the same thing with less noise);
      accuracy_n: of the chosen candidate; any_n: at least one candidate is right, what a perfect
      choice would reach; and for each attribute its share in single samples.
    """
    right = verdicts['all']
    chosen = np.argmax(scores, axis=1)
    return {
        'accuracy_1': float(right.mean()),
        'accuracy_n': float(right[np.arange(len(right)), chosen].mean()),
        'any_n': float(right.any(axis=1).mean()),
        **{name: float(verdicts[name].mean()) for name in ATTRIBUTES},
    }


def psnr(images: np.ndarray, originals: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, averaged over images; both uint8 [n, S, S, 3]."""
    error = ((images.astype(np.float64) - originals) / 255) ** 2
    return float((-10 * np.log10(np.maximum(error.mean(axis=(1, 2, 3)), 1e-10))).mean())


def lookup(train_images: np.ndarray, images: np.ndarray, factor: int, vocab: int) -> np.ndarray:
    """The plain k-means lookup with as many codes as the dVAE, uint8 [n, S, S, 3]."""
    rebuilt = lookup_baseline(train_images, images, factor, vocab, jax.random.key(0))
    return np.round(np.clip(rebuilt, 0, 1) * 255).astype(np.uint8)


def distinct_patches(images: np.ndarray, factor: int) -> int:
    """How many different squares of factor x factor pixels the images consist of."""
    from dalle_jax.models.codebook import patches

    squares = np.ascontiguousarray(patches(images, factor))
    return len(np.unique(squares.view(f'V{squares.shape[1]}')))


def usage(ids: np.ndarray, vocab: int) -> tuple[np.ndarray, int, float]:
    """How often each code is used [vocab], how many are used, and their perplexity."""
    counts = np.bincount(ids.reshape(-1), minlength=vocab)
    share = counts[counts > 0] / counts.sum()
    return counts, int((counts > 0).sum()), float(np.exp(-(share * np.log(share)).sum()))
