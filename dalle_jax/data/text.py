"""Captions to token ids: byte-pair encoding by sentencepiece, BPE dropout by ourselves.

Ramesh et al. 2021, sec. 2.2: captions are lower-cased and encoded with a vocabulary of 16,384
pieces; footnote 5 and app. B.2: 10 % BPE dropout (Provilkov et al. 2020) in training.

sentencepiece trains the model and encodes without dropout. Its own sampling cannot be reproduced
from one process to the next, hence `encode_dropout`, which replays the merges in Python.

Ids: 0 pads and is never produced by encoding, 1 unknown, 2 and 3 sentencepiece's sentence marks,
which are never produced either; from 4 on bytes (where the model has them) and pieces.
"""

import dataclasses
import functools
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from dalle_jax.data.records import BadRecord

PAD, UNKNOWN, BEGIN, END = range(4)

# Spelling unseen characters in bytes takes 256 pieces. Below this size they would be more than a
# quarter of the vocabulary, and the captions of such a small corpus hardly hold unseen characters.
BYTE_FALLBACK_FROM = 1024

# One word of a normalised text, where sentencepiece writes a space as U+2581; pieces never span
# two words.
WORD = re.compile('\u2581[^\u2581]*|[^\u2581]+')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-pair encoding, held as the bytes of a sentencepiece model.

    Pickles, compares and hashes by these bytes; one instance may serve several threads.

    Attributes:
      model: the serialized model.

    Raises ValueError where the bytes are no BPE model with id 0 for padding.
    """

    model: bytes = dataclasses.field(repr=False)

    def __post_init__(self):
        try:
            size = self._processor.vocab_size() if self.model else 0
        except RuntimeError as error:
            raise ValueError('not a sentencepiece model') from error
        if size == 0:
            raise ValueError('not a sentencepiece model: it holds no pieces')
        if self._processor.pad_id() != PAD:
            raise ValueError(f'padding has id {self._processor.pad_id()} in this model, it must be '
                             f'{PAD}: train it with pad_id={PAD}')
        if any(rank != int(rank) for rank, _ in self._pieces.values()):
            raise ValueError('not a byte-pair encoding: its scores are no merge ranks; train it '
                             "with model_type='bpe'")

    def __reduce__(self):
        return type(self), (self.model,)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 16384) -> 'Tokenizer':
        """Learns an encoding of at most `vocab_size` pieces; the same captions give the same bytes.

        Fewer pieces result where the captions have fewer to offer. From 1,024 pieces on, characters
        that the captions do not contain are spelt in bytes; below, they become the unknown id.

        Raises ValueError where no caption has text, or the vocabulary cannot hold the characters.
        """
        captions = [caption for caption in captions if caption.strip()]
        if not captions:
            raise ValueError('no captions to train the tokenizer on: the training data has none '
                             'or only blank ones')
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(captions), model_writer=model, model_type='bpe',
                vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0,
                byte_fallback=vocab_size >= BYTE_FALLBACK_FROM,
                normalization_rule_name='nmt_nfkc_cf',  # NFKC and case folding
                max_sentence_length=1 << 20,  # bytes; longer captions would be left out silently
                pad_id=PAD, unk_id=UNKNOWN, bos_id=BEGIN, eos_id=END, minloglevel=2)
        except RuntimeError as error:
            needed = re.search(r'smaller than required_chars\. \d+ vs (\d+)', str(error))
            if needed:
                raise ValueError(f'vocab_size {vocab_size} is too small: the characters of these '
                                 f'captions alone take {needed[1]} pieces; raise it') from error
            raise ValueError(f'no tokenizer can be trained on these {len(captions)} captions: '
                             f'{error}') from error
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> 'Tokenizer':
        """Reads a model file; errors name it."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f'no tokenizer at {path}: expected a sentencepiece model file')
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error

    def save(self, path: str | Path) -> None:
        """Writes the model file at once: a killed process leaves the whole of it or nothing."""
        partial = Path(path).with_name(Path(path).name + '.tmp')
        partial.write_bytes(self.model)
        partial.replace(path)

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        return self._processor.vocab_size()

    @property
    def hash(self) -> str:
        """sha256 of the model in hexadecimal: what runs record to tell encodings apart."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a caption. Raises BadRecord where normalisation leaves nothing of it."""
        return _not_empty(self._processor.encode(text), text)

    def encode_dropout(self, text: str, p: float, rng: np.random.Generator) -> list[int]:
        """The ids of a caption when every possible merge fails with probability p at every step.

        Provilkov et al. 2020, algorithm 1: of the pairs that could merge, each is dropped with
        probability p, the best of the others merges, and a word is done once none is left. p = 0
        gives `encode`, p = 1 characters. The draws depend on nothing but `rng` and the text.
        """
        if not 0 <= p <= 1:
            raise ValueError(f'BPE dropout {p} is not a probability: give a number from 0 to 1')
        if p == 0:
            return self.encode(text)
        ids = []
        runs = _lucky_runs(p, rng)
        lucky = next(runs)
        for word in WORD.findall(self._processor.normalize(text)):
            whole, merges = self._encode_word(word)
            if lucky >= merges:
                # Without a dropped pair every merge takes one draw: nothing happens to this word.
                lucky -= merges
                ids += whole
            else:
                pieces, lucky = self._merge(word, lucky, runs)
                ids += self._ids(pieces)
        return _not_empty(ids, text)

    def decode(self, ids: Iterable[int]) -> str:
        """The normalised text of ids; padding and sentence marks read as nothing."""
        return self._processor.decode([int(i) for i in ids])

    def batch(self, captions: Sequence[str], length: int, p: float = 0.0,
              rng: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
        """Encodes captions into an array, with BPE dropout where p > 0 (which needs `rng`).

        Returns int32 [len(captions), length], padded on the right with 0, and how many captions had
        more than `length` tokens, of which the first `length` are kept.
        """
        ids = np.full((len(captions), length), PAD, np.int32)
        truncated = 0
        for row, caption in zip(ids, captions):
            tokens = self.encode_dropout(caption, p, rng) if p else self.encode(caption)
            truncated += len(tokens) > length
            row[:len(tokens)] = tokens[:length]
        return ids, truncated

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def _pieces(self) -> dict[str, tuple[float, int]]:
        """What text can be made of: piece -> (rank, id); the lowest rank merges first."""
        p = self._processor
        ids = [i for i in range(p.vocab_size())
               if not (p.is_control(i) or p.is_unknown(i) or p.is_byte(i))]
        return {p.id_to_piece(i): (-p.get_score(i), i) for i in ids}

    @functools.cached_property
    def _bytes(self) -> list[int] | None:
        """The ids of the 256 byte values, or None where the model has no byte pieces."""
        p = self._processor
        ids = [p.piece_to_id(f'<0x{value:02X}>') for value in range(256)]
        return ids if all(p.is_byte(i) for i in ids) else None

    @functools.cached_property
    def _encode_word(self):
        """word -> (ids, number of merges) without dropout, remembered: words repeat."""
        @functools.lru_cache(maxsize=1 << 16)
        def encode(word: str) -> tuple[list[int], int]:
            pieces, _ = self._merge(word, len(word), iter(()))
            return self._ids(pieces), len(word) - len(pieces)
        return encode

    def _merge(self, word: str, lucky: int, runs: Iterator[int]) -> tuple[list[str], int]:
        """Merges the characters of a word, where `lucky` more pairs are kept before one is dropped.

        The next values of `lucky` come from `runs`. Returns the pieces and what is left of it.
        Pairs are tried in the order of rank until one is kept; trying the rest would not matter.
        """
        pieces = list(word)
        while True:
            pairs = [(self._pieces[a + b][0], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:]))
                     if a + b in self._pieces]
            for _, i in sorted(pairs):
                if lucky:
                    lucky -= 1
                    pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
                    break
                lucky = next(runs)
            else:
                return pieces, lucky

    def _ids(self, pieces: list[str]) -> list[int]:
        ids = []
        for piece in pieces:
            if piece in self._pieces:
                ids.append(self._pieces[piece][1])
            elif self._bytes:
                ids += [self._bytes[value] for value in piece.encode()]
            elif not ids or ids[-1] != UNKNOWN:  # sentencepiece joins neighbouring unknowns
                ids.append(UNKNOWN)
        return ids


def _lucky_runs(p: float, rng: np.random.Generator) -> Iterator[int]:
    """How many pairs are kept between two dropped ones, for ever; geometric, drawn in bulk."""
    while True:
        yield from (rng.geometric(p, 16) - 1).tolist()


def _not_empty(ids: list[int], text: str) -> list[int]:
    if not ids:
        raise BadRecord(f'caption {text!r} is empty after normalisation')
    return ids
