"""Which state sees which: the attention patterns of DALL-E (Ramesh et al. 2021, app. B.1, fig. 11).

The states of a sequence are `text` text states followed by rows x columns image states in raster
order. Text attends causally to text and never to the image; an image state attends to all of the
text and to some of the image, by the layer's pattern:

    'row'      the previous `columns` states in raster order and itself, across row borders
    'column'   its own column, down to its own row
    'conv'     a causal kernel x kernel window that wraps around as the row pattern does
    'causal'   everything before it and itself (also for plain sequences, without a Layout)

`offsets` and `mask` are the definition and the oracle. What computes in blocks takes the states of
a column layer's image column by column (`transposed`), so that a column's states follow each other
as those of a row do, and then all patterns are alike: `visible` is the pattern in that order.

B batch, H heads, D head size, I image states.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

PATTERNS = ('row', 'column', 'conv', 'causal')


@dataclasses.dataclass(frozen=True)
class Layout:
    """The states of a sequence.

    Attributes:
      text: T, at least 1 (a start-of-text state).
      rows, columns: of the image grid.
      kernel: odd side of the 'conv' window; it may exceed the grid.
    """

    text: int
    rows: int
    columns: int
    kernel: int = 11

    def __post_init__(self):
        for name in ('text', 'rows', 'columns', 'kernel'):
            if getattr(self, name) < 1:
                raise ValueError(f'layout: {name}={getattr(self, name)} must be at least 1')
        if self.kernel % 2 == 0:
            raise ValueError(f'layout: kernel={self.kernel} must be odd, to have a middle')

    @property
    def image(self) -> int:
        return self.rows * self.columns

    @property
    def length(self) -> int:
        return self.text + self.image


def offsets(kind: str, layout: Layout) -> np.ndarray:
    """The pattern among image states: an image query sees the key `offset` states before it.

    Returns:
      sorted distinct int offsets >= 0; those that reach before the first image state see nothing.
    """
    rows, columns, half = layout.rows, layout.columns, layout.kernel // 2
    if kind == 'row':
        found = range(columns + 1)
    elif kind == 'column':
        found = range(0, rows * columns, columns)
    elif kind == 'conv':
        # Whole kernel rows, and what the right-hand half of the row above them leaves when the
        # window wraps around at the left edge (fig. 11d).
        found = [above * columns + shift for above in range(half + 1)
                 for shift in range(-half, half + 1)]
        found += [(half + 1) * columns - shift for shift in range(1, half + 1)]
    elif kind == 'causal':
        found = range(layout.image)
    else:
        raise ValueError(f'attention pattern {kind!r}; choose one of {PATTERNS}')
    return np.unique([offset for offset in found if offset >= 0])


def mask(kind: str, layout: Layout) -> np.ndarray:
    """Which query (row) sees which key (column): bool [L, L]."""
    text, state = layout.text, np.arange(layout.length)
    query, key = state[:, None], state[None, :]
    both_image = (query >= text) & (key >= text)
    return np.where(both_image, np.isin(query - key, offsets(kind, layout)),
                    (key < text) & (key <= query))


def visible_pairs(kind: str, layout: Layout) -> int:
    """How many pairs of a query and a key a pattern allows: the ones of `mask`."""
    image = int(np.maximum(layout.image - offsets(kind, layout), 0).sum())
    return layout.text * (layout.text + 1) // 2 + layout.image * layout.text + image


def window_reach(layout: Layout) -> int:
    """States before itself within which all lie that a 'conv' query sees of the image."""
    half = layout.kernel // 2
    return half * layout.columns + max(layout.columns - 1, half)  # the latter: wider than the grid


def visible(kind: str, layout: Layout | None, query: Any, key: Any) -> Any:
    """Whether the states `query` see the states `key`, in that order.

    Args:
      kind: 'row', 'column', 'conv' or 'causal'.
      layout: not needed for 'causal'.
      query, key: int32 indices that broadcast against each other; of numpy or traced. They may lie
        beyond the last state; every state sees itself.

    Raises:
      ValueError: no such pattern.
    """
    past = key <= query
    if kind == 'causal':
        return past
    behind = query - key
    if kind == 'row':
        near = behind <= layout.columns
    elif kind == 'column':
        near = behind <= (query - layout.text) % layout.rows
    elif kind == 'conv':
        # Within `half` of a multiple of a row, and then what the last such multiple wraps to.
        half = layout.kernel // 2
        near = (behind <= window_reach(layout)) & ((behind + half) % layout.columns <= 2 * half)
    else:
        raise ValueError(f"attention pattern {kind!r}; choose 'row', 'column', 'conv' or 'causal'")
    return past & (near | (key < layout.text))


def transposed(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Image states [B, H, I, D] of a rows x columns grid in the order of the transposed grid."""
    batch, heads, _, size = x.shape
    return x.reshape(batch, heads, rows, columns, size).swapaxes(2, 3).reshape(x.shape)
