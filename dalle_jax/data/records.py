"""What every data source yields."""

from typing import NamedTuple, Protocol

import numpy as np


class Record(NamedTuple):
    """One image with its captions.

    Attributes:
      image: an encoded file (jpeg, png, webp), or uint8 [H, W, 3]; None where there are codes.
      captions: one or more; training draws one of them each time.
      name: how messages call this record.
      codes: image tokens of K crops of the image, integers [K, h, w], from a source of those.
    """

    image: bytes | np.ndarray | None
    captions: tuple[str, ...]
    name: str
    codes: np.ndarray | None = None


class BadRecord(ValueError):
    """A record that cannot be used: unreadable, too small, without a caption.

    The message names the record and the reason. A pipeline counts it and takes another one.
    """


class Source(Protocol):
    """Random access to records; indexing may raise BadRecord."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...
