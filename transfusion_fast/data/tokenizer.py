"""Tokenizers of text: plain bytes, or a tokenizer.json; and the description by which a data folder names its own."""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from transfusion_fast.data.folder import Folder, as_folder
from transfusion_fast.errors import InputError, Rejected, optional_module
from transfusion_fast.files import write_atomically

TOKENIZER_NAME = "tokenizer.json"
_MAX_TOKENS = 1 << 30  # leaves room for special tokens in int32
# Categories of characters that a tokenizer's rules may remove: control characters, unassigned ones, and accents.
_REMOVABLE = ("Cc", "Cf", "Co", "Cn", "Mn")
# Steps of a tokenizer.json that remove nothing but such characters and white space. Of models, none removes anything:
# they replace what they do not know or raise an error.
_KEEPING = frozenset((
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Strip", "StripAccents", "BertNormalizer",
    "ByteLevel", "Metaspace", "Digits", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts",
))  # fmt: skip
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


class TokenizerDescription(TypedDict):
    """The identity of a tokenizer in a folder's index: equal exactly for tokenizers that give equal ids."""

    name: str
    num_text_tokens: int
    sha256: str


class Tokenizer(ABC):
    """A tokenizer of text. It knows nothing of the special tokens of documents."""

    name: str
    num_text_tokens: int
    content: bytes
    """Bytes that differ for tokenizers that give different ids."""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 [n]; raise InputError if they would not represent all of it."""
        try:
            return self.encode_with_starts(text)[0]
        except Rejected as rejected:
            raise InputError(
                f"text must be of the vocabulary of {self.name}, got {rejected}; change the text or the tokenizer"
            ) from rejected

    @abstractmethod
    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, and the ascending index of each's first character, int64 [n]; Rejected if text is lost."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray | Rejected]:
        """Return for each text its ids, int32 [n], or why it is rejected."""
        found: list[np.ndarray | Rejected] = []
        for text in texts:
            try:
                found.append(self.encode_with_starts(text)[0])
            except Rejected as rejected:
                found.append(rejected)
        return found

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, with U+FFFD for invalid UTF-8; raise InputError for an unknown id."""

    def describe(self) -> TokenizerDescription:
        """Return the description that an index stores."""
        sha256 = hashlib.sha256(self.content).hexdigest()
        return {"name": self.name, "num_text_tokens": self.num_text_tokens, "sha256": sha256}

    def write(self, folder: Path) -> None:  # noqa: B027
        """Write the file that `load_tokenizer` needs beside the index, if any."""

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        values = np.asarray(ids, dtype=np.int64)
        outside = values[(values < 0) | (values >= self.num_text_tokens)]
        if outside.size:
            raise InputError(
                f"text ids must be in 0..{self.num_text_tokens - 1}, got {outside[0]}; "
                "remove special tokens before decoding"
            )
        return values


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as token ids 0..255."""

    name = "bytes"
    num_text_tokens = 256
    content = b'{"encoding": "utf-8", "name": "bytes", "num_text_tokens": 256}'

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = _utf8(text)
        return np.frombuffer(encoded, dtype=np.uint8).astype(np.int32), _characters(encoded)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray | Rejected]:
        encoded = [_utf8(text) for text in texts]
        ids = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.int32)
        return [*_split(ids, map(len, encoded))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._checked(ids).astype(np.uint8).tobytes().decode(errors="replace")


class FileTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library.

    Its special tokens are never added, and no text becomes one. A text is encoded completely or rejected: a character
    that no token covers is an error, except for white space, control characters and accents that the tokenizer's own
    rules remove. The file's unknown token and the tokens of single bytes, <0x00> to <0xFF>, count as ordinary tokens,
    even if the file calls them special.
    """

    name = TOKENIZER_NAME

    def __init__(self, content: bytes, where: str = TOKENIZER_NAME) -> None:
        """Read the contents of a tokenizer.json; raise InputError naming `where` if they are invalid. No code runs."""
        library = _library()
        self.content = content
        try:
            self._tokenizer = library.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise InputError(
                f"{where} must be a tokenizer.json of the library tokenizers, got {error}; correct it"
            ) from error
        # The file's truncation, padding and special tokens would change texts silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.num_text_tokens = 1 + max(vocabulary.values(), default=-1)
        if self.num_text_tokens > _MAX_TOKENS:
            raise InputError(f"ids of {where} must be below {_MAX_TOKENS}, got {self.num_text_tokens - 1}; correct it")
        model = self._tokenizer.model
        if isinstance(model, library.models.BPE):
            model.dropout = None  # would encode a text differently each time
            if model.unk_token is None:
                # By default BPE drops unknown characters. With an unknown token that it does not know, it raises.
                model.unk_token = max(vocabulary, key=len, default="") + "?"
        special = {number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        settings = json.loads(content)
        if isinstance(model, library.models.Unigram):
            unknown = settings["model"].get("unk_id")
        else:
            unknown = self._tokenizer.token_to_id(model.unk_token)
        ordinary = {unknown, *map(vocabulary.get, _BYTE_TOKENS)}
        self._special = np.array(sorted(special - ordinary), dtype=np.int32)
        self._keeps_text = all(_keeps_text(settings.get(step)) for step in ("normalizer", "pre_tokenizer"))
        by_bytes = self._keeps_text and _has_byte_level(settings.get("pre_tokenizer"))
        self._byte_lengths = self._count_bytes(vocabulary) if by_bytes else None
        self._has_words = isinstance(model, (library.models.WordLevel, library.models.WordPiece))

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = _utf8(text)
        if found := self._encode_bytes(encoded):
            return found
        text = encoded.decode()
        ids, spans = self._encode(text)
        if (special := np.isin(ids, self._special)).any():
            start, end = spans[special][0].tolist()
            raise Rejected("special token", f"{text[start:end]!r:.60} would become one")
        missing = [] if self._keeps_text else _uncovered(text, spans)
        if missing and not self._has_rewritten(missing, text):
            raise Rejected("not in the vocabulary", f"{missing[0]!r:.60}")
        return ids, np.maximum.accumulate(spans[:, 0])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray | Rejected]:
        texts = [_utf8(text).decode() for text in texts]
        lists = self._encode_fast(texts) if self._keeps_text else None
        if lists is None:
            return super().encode_batch(texts)
        ids = np.fromiter(chain.from_iterable(lists), dtype=np.int32)
        split = _split(ids, map(len, lists))
        if not np.isin(ids, self._special).any():
            return [*split]
        special = [np.isin(own, self._special).any() for own in split]
        return [  # encoded again, as the rejection says where
            super(FileTokenizer, self).encode_batch([text])[0] if has_special else own
            for text, own, has_special in zip(texts, split, special, strict=True)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(self._checked(ids).tolist(), skip_special_tokens=False)

    def write(self, folder: Path) -> None:
        write_atomically(folder / TOKENIZER_NAME, self.content)

    def _encode_fast(self, texts: list[str]) -> list[list[int]] | None:
        """Return the ids of each text; None if one of them cannot be encoded."""
        try:
            return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if not _is_refusal(error):
                raise
            return None

    def _encode_bytes(self, encoded: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """Return what `encode_with_starts` does of UTF-8, by the bytes that each token stands for.

        Offsets from the library take half as long again. None if only they tell: a token stands for other bytes, or
        the text is to be rejected.
        """
        if self._byte_lengths is None or not (lists := self._encode_fast([encoded.decode()])):
            return None
        ids = np.fromiter(lists[0], dtype=np.int32)
        lengths = self._byte_lengths[ids]
        if lengths.sum() != len(encoded) or np.isin(ids, self._special).any():
            return None
        return ids, _characters(encoded)[np.cumsum(lengths) - lengths]

    def _count_bytes(self, vocabulary: Mapping[str, int]) -> np.ndarray:
        """Return how many bytes each id of a byte-level vocabulary stands for, int64; it has a letter for each byte."""
        lengths = np.zeros(self.num_text_tokens, np.int64)
        for token, number in vocabulary.items():
            lengths[number] = len(token)
        for number, token in self._tokenizer.get_added_tokens_decoder().items():
            lengths[number] = len(token.content.encode())
        return lengths

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids, int32 [n], and their first and end characters, int64 [n, 2]; Rejected names what is unknown."""
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not _is_refusal(error):
                raise
            if type(error) is not Exception:
                raise InputError(f"{self.name} must encode any text, got an error ({error}); give another") from error
            for piece in dict.fromkeys(text.split() if self._has_words else text):
                if piece != text:
                    self._encode(piece)  # rejects the first word or character that cannot be encoded alone
            raise Rejected("not in the vocabulary", f"{text!r:.60}") from error
        return np.array(encoded.ids, dtype=np.int32), np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)

    def _has_rewritten(self, missing: Sequence[str], text: str) -> bool:
        """Return True if the file's rules composed or replaced characters without a token, but removed none."""
        rules = self._tokenizer.normalizer
        if rules is None or any(rules.normalize_str(f"{run} ") == rules.normalize_str(" ") for run in missing):
            return False
        rewritten = rules.normalize_str(text)
        return not _uncovered(rewritten, self._encode(rewritten)[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _cached_tokenizer, (self.content,)


@functools.lru_cache(maxsize=2)
def _cached_tokenizer(content: bytes) -> FileTokenizer:
    """Return one tokenizer a process: workers unpickle it with every task, which takes up to a second."""
    return FileTokenizer(content)


def train_bpe(texts: Iterable[str], vocabulary: int) -> FileTokenizer:
    """Train a byte-level BPE of `vocabulary` tokens, which encodes any text. Equal texts give equal bytes.

    Raises:
        InputError: `vocabulary` is below the 256 bytes, or above what the texts yield.
    """
    if vocabulary < 256:
        raise InputError(f"vocabulary of a byte-level BPE must be at least 256, got {vocabulary}; give a larger one")
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((_utf8(text).decode() for text in texts), trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise InputError(
            f"vocabulary must be at most the {tokenizer.get_vocab_size()} tokens that these texts yield, "
            f"got {vocabulary}; give a smaller one or more text"
        )
    return FileTokenizer(tokenizer.to_str().encode())


def load_tokenizer(description: Mapping[str, Any], folder: Folder | Path | str) -> Tokenizer:
    """Return the tokenizer that an index describes, from the file that `write` left in `folder`.

    Raises:
        InputError: The tokenizer is unknown, or its file is missing or different.
        FetchError: Its remote file cannot be fetched.
    """
    folder, name = as_folder(folder), description.get("name")
    if name == ByteTokenizer.name:
        tokenizer: Tokenizer = ByteTokenizer()
    elif name == FileTokenizer.name:
        tokenizer = FileTokenizer(folder.read_bytes(TOKENIZER_NAME), folder.path_to(TOKENIZER_NAME))
    else:
        known = f"{ByteTokenizer.name!r} or {FileTokenizer.name!r}"
        raise InputError(f"tokenizer must be {known}, got {name!r}; prepare the data again with it")
    for field, value in tokenizer.describe().items():
        if description.get(field) != value:
            raise InputError(
                f"{field} of tokenizer {tokenizer.name!r} of {folder} must be {description.get(field)!r}, as its index "
                f"says, got {value!r}; restore the tokenizer that the data was prepared with, or prepare it again"
            )
    return tokenizer


def read_tokenizer(path: Path) -> FileTokenizer:
    """Return the tokenizer in a file; raise InputError if there is none."""
    try:
        return FileTokenizer(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"tokenizer {path} cannot be read ({error.strerror}); give a tokenizer.json") from error


def _library() -> Any:
    return optional_module("tokenizers", "data")


def _utf8(text: str) -> bytes:
    """Encode text, with question marks for lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode(errors="replace")


def _characters(encoded: bytes) -> np.ndarray:
    """Return the number of the character to which each byte of UTF-8 belongs, int64."""
    return np.cumsum((np.frombuffer(encoded, np.uint8) & 0xC0) != 0x80) - 1


def _split(ids: np.ndarray, lengths: Iterable[int]) -> list[np.ndarray]:
    """Return the parts of these lengths, which are views."""
    ends = [0, *accumulate(lengths)]
    return [ids[start:end] for start, end in pairwise(ends)]


def _is_refusal(error: BaseException) -> bool:
    """Return True for what the library raises: Exception for unknown characters, or a panic, which is no Exception."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _keeps_text(step: Any) -> bool:
    """Return True for a normalizer or pre-tokenizer of a tokenizer.json that loses no text, whatever the text."""
    match step:
        case None:
            return True
        case {"type": "Sequence", "normalizers": list(steps)} | {"type": "Sequence", "pretokenizers": list(steps)}:
            return all(map(_keeps_text, steps))
        case {"type": "Replace", "content": str(content)}:
            return content != ""
        case {"type": "Split" | "Punctuation", "behavior": str(behavior)}:
            return behavior != "Removed"
        case {"type": kind}:
            return kind in _KEEPING
    return False


def _has_byte_level(step: Any) -> bool:
    """Return whether a pre-tokenizer of a tokenizer.json writes texts as bytes."""
    match step:
        case {"type": "Sequence", "pretokenizers": list(steps)}:
            return any(map(_has_byte_level, steps))
        case {"type": kind}:
            return kind == "ByteLevel"
    return False


def _uncovered(text: str, spans: np.ndarray) -> list[str]:
    """Return each run of characters that no token covers, except characters that a tokenizer may remove."""
    starts, ends = (np.bincount(column, minlength=len(text) + 1) for column in spans.T)
    bare = np.flatnonzero(np.cumsum(starts - ends)[:-1] <= 0).tolist()
    lost = np.array([at for at in bare if not _is_removable(text[at])], dtype=np.int64)
    runs = np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1)
    return [text[run[0] : run[-1] + 1] for run in runs if run.size]


def _is_removable(character: str) -> bool:
    """Return True for a character whose removal loses nothing to a reader."""
    return character.isspace() or character == "\ufffd" or unicodedata.category(character) in _REMOVABLE
