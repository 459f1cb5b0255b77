"""The byte-pair encoding of the released CLIPs (Radford et al. 2021, sec. 2.4).

Its words are those of GPT-2's encoding in lower case: contractions, runs of letters, single digits,
runs of anything else. A word's bytes are symbols, the last of them marked with `</w>`, and the pair
that stands first in the list of merges is joined until none is left.

The released ids are 256 bytes, the same as ends of words, the merges in order, the start of text
and the end of text. Here all are one higher, so that 0 is free, and 0 is the end of text as well as
padding: `models.clip` reads a caption at its first 0. `encode` gives [start, words...].
"""

import functools
import gzip
import html
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dalle_jax.data.records import BadRecord
from dalle_jax.data.text import Tokenizer

HEADER = b'#version: 0.2\n'
END_OF_WORD = '</w>'
START, END = '<|startoftext|>', '<|endoftext|>'
WORDS = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
         r'|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+')


class ClipTokenizer(Tokenizer):
    """The encoding of a list of merges; `model` holds it as text, a merge a line after HEADER.

    Raises ValueError where these are no merges.
    """

    def __post_init__(self):
        lines = self.model.decode().split('\n')[1:-1]
        symbols = {*_alphabet()}
        for number, line in enumerate(lines, start=1):
            pair = line.split(' ')
            if len(pair) != 2 or not symbols.issuperset(pair) or ''.join(pair) in symbols:
                raise ValueError(f'merge {number} is {line!r}, which does not join two symbols of '
                                 'the lines before to a new one: no list of merges, or a damaged '
                                 'one')
            symbols.add(''.join(pair))

    @classmethod
    def read(cls, path: str | Path, vocab_size: int) -> 'ClipTokenizer':
        """Reads the merges as they are published.

        Args:
          path: bpe_simple_vocab_16e6.txt.gz, or merges.txt; with a vocab.json beside merges.txt its
            ids must agree.
          vocab_size: of the model, 49,408 of all released ones. Merges beyond it are unused.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no list of merges, or too short; names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file; name bpe_simple_vocab_16e6.txt.gz or '
                                    'merges.txt')
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if data[:2] == b'\x1f\x8b' else data).decode()
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f'{path}: truncated or damaged, download it again: {error}'
                             ) from error
        first, *lines = text.rstrip('\n').split('\n')
        if '#version' not in first:
            raise ValueError(f'{path}: no list of merges, whose first line names its #version; it '
                             'is bpe_simple_vocab_16e6.txt.gz or merges.txt')
        wanted = vocab_size - len(_alphabet()) - len((START, END))
        if len(lines) < wanted:
            raise ValueError(f'{path}: {len(lines)} merges, and the model, with {vocab_size} ids, '
                             f'has {wanted}; give the list that was published with it')
        try:
            found = cls(HEADER + '\n'.join([*lines[:wanted], '']).encode())
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
        vocab = path.with_name('vocab.json')
        if vocab.exists() and _ids(vocab) != found._released:
            raise ValueError(f'{vocab} does not number the symbols as {path} does; give the two '
                             'files of one model')
        return found

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        return len(self._released)

    def encode(self, text: str) -> list[int]:
        """The ids [start, words...] of a caption. Raises BadRecord where it has no words."""
        start, words = self._released[START] + 1, []
        for word in _words().findall(clean(text)):
            if word == END:
                break
            words += [start] if word == START else self._encode_word(word)
        if not words:
            raise BadRecord(f'caption {text!r} is empty after normalisation')
        return [start, *words]

    def encode_dropout(self, text: str, p: float, rng: np.random.Generator) -> list[int]:
        """Raises ValueError unless p is 0: the released CLIPs have seen no BPE dropout."""
        if p:
            raise ValueError(f"BPE dropout {p}: CLIP's encoding has none; set data.bpe_dropout=0")
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The normalised text of ids, a space behind each word; start and padding are nothing."""
        symbols = [*self._released]
        text = ''.join(symbols[int(i) - 1] for i in ids if i and symbols[int(i) - 1] != START)
        value = {symbol: byte for byte, symbol in enumerate(_symbols())}
        words = (bytes(value[c] for c in word).decode(errors='replace')
                 for word in text.split(END_OF_WORD))
        return ' '.join(words).strip()

    @functools.cached_property
    def _released(self) -> dict[str, int]:
        """Symbol -> released id, in their order."""
        merges = (''.join(pair) for pair in self._ranks)
        return {s: i for i, s in enumerate((*_alphabet(), *merges, START, END))}

    @functools.cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        lines = self.model.decode().split('\n')[1:-1]
        return {tuple(line.split(' ')): rank for rank, line in enumerate(lines)}

    @functools.cached_property
    def _encode_word(self):
        """word -> ids, remembered: words repeat."""
        @functools.lru_cache(maxsize=1 << 16)
        def encode(word: str) -> list[int]:
            symbols = [_symbols()[byte] for byte in word.encode()]
            symbols[-1] += END_OF_WORD
            return [self._released[symbol] + 1 for symbol in self._merge(symbols)]
        return encode

    def _merge(self, symbols):
        """Joins the first-ranked pair, everywhere from left to right, until there is none."""
        while True:
            rank, pair = min(((self._ranks.get(pair, math.inf), pair)
                              for pair in zip(symbols, symbols[1:])), default=(math.inf, None))
            if rank == math.inf:
                return symbols
            joined, i = [], 0
            while i < len(symbols):
                twin = tuple(symbols[i:i + 2]) == pair
                joined.append(''.join(symbols[i:i + 1 + twin]))
                i += 1 + twin
            symbols = joined


def _ids(path):
    try:
        return json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: truncated or damaged, download it again: {error}') from error


def from_bytes(model: bytes) -> Tokenizer:
    """The encoding, of either kind, that these bytes hold."""
    return (ClipTokenizer if model.startswith(HEADER) else Tokenizer)(model)


def load(path: str | Path) -> Tokenizer:
    """Reads what `save` of either kind has written; errors name the file."""
    path = Path(path)
    clips = path.is_file() and path.read_bytes().startswith(HEADER)
    return (ClipTokenizer if clips else Tokenizer).load(path)


def clean(text: str) -> str:
    """Repaired encodings and HTML entities, single spaces, lower case: as the released code."""
    import ftfy
    import regex

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r'\s+', ' ', text).strip().lower()


@functools.cache
def _words():
    import regex  # Unicode's letters and numbers, which `re` cannot name

    return regex.compile(WORDS, regex.IGNORECASE)


@functools.cache
def _symbols() -> tuple[str, ...]:
    """Byte -> printable character: itself, or for what is none, from U+0100 on in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(b if b in printable else 256 + others.index(b)) for b in range(256))


@functools.cache
def _alphabet() -> tuple[str, ...]:
    """The first 512 symbols in released order: printable bytes first, then the ends of words."""
    bytes_in_order = sorted(range(256), key=lambda byte: ord(_symbols()[byte]))
    whole = [_symbols()[byte] for byte in bytes_in_order]
    return (*whole, *(symbol + END_OF_WORD for symbol in whole))
