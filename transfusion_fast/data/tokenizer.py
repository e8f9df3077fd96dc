"""Text to token ids: bytes, or a tokenizer.json; and the fingerprint by which a data folder names its tokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from transfusion_fast.data.folder import DataFolder, RemoteFolder
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.files import write_whole

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_NAME = "tokenizer.json"
_MAX_TOKENS = 1 << 30  # int32 holds them, and special ones behind them

_REMOVABLE = ("Cc", "Cf", "Co", "Cn", "Mn")  # what is no character to be seen, and marks such as accents
_COMPOSED: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")


class Tokenizer(Protocol):
    """What the rest knows of a tokenizer. Special tokens of documents are not its business."""

    name: str
    num_text_tokens: int

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [n]; InputError where they would not be all of it."""

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids, and the character of `text` that each begins with, int64 [n], ascending.

        Raises:
            Rejected: they would not be all of it.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD. InputError for an id that it does not have."""

    def describe(self) -> dict[str, str | int]:
        """What a data folder's index says of it: equal exactly where two tokenizers give equal ids."""

    def write(self, folder: Path) -> None:
        """Puts beside an index what `load_tokenizer` needs."""


class ByteTokenizer:
    """UTF-8 bytes as token ids 0..255."""

    name = "bytes"
    num_text_tokens = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32)

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        begins_character = (ids & 0xC0) != 0x80
        return ids, np.cumsum(begins_character) - 1

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return _checked(ids, self.num_text_tokens).astype(np.uint8).tobytes().decode(errors="replace")

    def describe(self) -> dict[str, str | int]:
        description = {"name": self.name, "num_text_tokens": self.num_text_tokens, "encoding": "utf-8"}
        sha256 = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        return {"name": self.name, "num_text_tokens": self.num_text_tokens, "sha256": sha256}

    def write(self, folder: Path) -> None:
        """Nothing is needed."""


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library.

    Its special tokens are never added, and no text becomes one. A text is encoded as a whole or not at all: characters
    that no token covers are an error, save what a tokenizer removes by its own rules and what leaves the words as they
    are: white space, control characters and accents. What the file calls its unknown token is a token like others.
    """

    name = TOKENIZER_NAME

    def __init__(self, content: bytes, where: str = TOKENIZER_NAME) -> None:
        """Raises InputError for what is no tokenizer; the file is JSON and runs no code."""
        self.content = content
        try:
            self._tokenizer: tokenizers.Tokenizer = _library().Tokenizer.from_buffer(content)
        except ValueError as error:
            raise InputError(f"{where} must be a tokenizer of the tokenizers library, and is not ({error})") from error
        # A length or padding that it came with would cut texts in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.num_text_tokens = 1 + max(vocabulary.values(), default=-1)
        if self.num_text_tokens > _MAX_TOKENS:
            raise InputError(f"ids of {where} must be below {_MAX_TOKENS}, got {self.num_text_tokens - 1}; mend it")
        model = self._tokenizer.model
        if isinstance(model, _library().models.BPE):
            model.dropout = None  # which would encode a text otherwise each time
            if model.unk_token is None:
                # It drops what it does not know, unless its unknown token is unknown too: then it raises.
                model.unk_token = max(vocabulary, key=len, default="") + "?"
        self._special = self._special_ids()

    def encode(self, text: str) -> np.ndarray:
        try:
            return self.encode_with_starts(text)[0]
        except Rejected as rejected:
            raise InputError(
                f"text must be of the vocabulary of {self.name}, got {rejected}; change the text or the tokenizer"
            ) from rejected

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        text = _utf8(text).decode()
        ids, spans = self._encode(text)
        if (special := np.isin(ids, self._special)).any():
            start, end = spans[special][0].tolist()
            raise Rejected("special token", f"{text[start:end]!r:.60} would become one")
        if (missing := _uncovered(text, spans)) and not self._is_rewritten(text, ids):
            raise Rejected("not in the vocabulary", f"{missing!r}")
        return ids, np.maximum.accumulate(spans[:, 0])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(_checked(ids, self.num_text_tokens).tolist(), skip_special_tokens=False)

    def describe(self) -> dict[str, str | int]:
        sha256 = hashlib.sha256(self.content).hexdigest()
        return {"name": self.name, "num_text_tokens": self.num_text_tokens, "sha256": sha256}

    def write(self, folder: Path) -> None:
        write_whole(folder / TOKENIZER_NAME, self.content)

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, int32 [n]; their first characters and the ends behind their last, int64 [n, 2])."""
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of its Rust, which derives from no Exception
                raise InputError(f"{self.name} must encode texts, and fails at one ({error}); give another") from error
            if type(error) is not Exception:  # the library raises this very class
                raise
            raise Rejected("not in the vocabulary", self._first_unknown(text) or f"part of it ({error})") from error
        return np.array(encoded.ids, dtype=np.int32), np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)

    def _first_unknown(self, text: str) -> str:
        """The first character, or else word, that cannot be encoded by itself; a model of words knows few letters."""
        models = _library().models
        whole_words = isinstance(self._tokenizer.model, (models.WordLevel, models.WordPiece))
        for piece in dict.fromkeys(text.split() if whole_words else text):
            try:
                self._tokenizer.encode(piece, add_special_tokens=False)
            except Exception as error:
                if type(error) is not Exception:
                    raise
                return f"{piece!r:.60}"
        return ""

    def _is_rewritten(self, text: str, ids: np.ndarray) -> bool:
        """Whether nothing is missing of `text` as it is once the tokenizer's own rules rewrote or composed it."""
        forms = [unicodedata.normalize(form, text) for form in _COMPOSED]
        forms.append(self._replaced(text))
        for composed in forms:
            if composed != text:
                again, spans = self._encode(composed)
                if np.array_equal(ids, again) and not _uncovered(composed, spans):
                    return True
        return False

    def _replaced(self, text: str) -> str:
        """The text with what the file's rules put in place of characters; rules that remove them are left out."""
        rules = [json.loads(self.content).get("normalizer") or {}]
        while rules:
            rule = rules.pop(0)
            rules = rule.get("normalizers", []) + rules
            if rule.get("type") == "Replace" and rule["content"]:
                [(kind, pattern)] = rule["pattern"].items()
                pattern = _library().Regex(pattern) if kind == "Regex" else pattern
                text = _library().normalizers.Replace(pattern, rule["content"]).normalize_str(text)
        return text

    def _special_ids(self) -> np.ndarray:
        """Of its special tokens but the unknown one, which is what texts may well hold."""
        special = {number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        model = self._tokenizer.model
        if isinstance(model, _library().models.Unigram):
            unknown = json.loads(self.content)["model"].get("unk_id")
        else:
            unknown = self._tokenizer.token_to_id(model.unk_token)
        return np.array(sorted(special - {unknown}), dtype=np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_tokenizer, (self.content,)


@functools.lru_cache(maxsize=2)
def _same_tokenizer(content: bytes) -> FileTokenizer:
    """One a process: a worker unpickles it with every task, and a large vocabulary takes most of a second."""
    return FileTokenizer(content)


def train_bpe(texts: Iterable[str], vocabulary: int) -> FileTokenizer:
    """Byte-level BPE of `vocabulary` tokens, any text encodes; the same texts give the same bytes.

    Raises:
        InputError: fewer tokens than the 256 bytes, or than the texts yield.
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


def load_tokenizer(description: Mapping[str, str | int], folder: DataFolder) -> Tokenizer:
    """The tokenizer that an index describes, with what `write` left in `folder`.

    Raises:
        InputError: it is unknown, or its file is missing or another one.
    """
    name = description.get("name")
    if name == ByteTokenizer.name:
        tokenizer: Tokenizer = ByteTokenizer()
    elif name == FileTokenizer.name:
        tokenizer = _read_tokenizer_of(folder)
    else:
        known = f"{ByteTokenizer.name!r} or {FileTokenizer.name!r}"
        raise InputError(f"tokenizer must be {known}, got {name!r}; prepare the data again with it")
    for field, value in tokenizer.describe().items():
        if description.get(field) != value:
            raise InputError(
                f"{field} of tokenizer {tokenizer.name!r} of {folder} must be {description.get(field)!r}, as its index "
                f"says, got {value!r}; put the tokenizer there that the data was made with, or prepare it again"
            )
    return tokenizer


def _read_tokenizer_of(folder: DataFolder) -> FileTokenizer:
    if isinstance(folder, RemoteFolder):
        return FileTokenizer(folder.read_bytes(TOKENIZER_NAME), folder / TOKENIZER_NAME)
    return read_tokenizer(folder / TOKENIZER_NAME)


def read_tokenizer(path: Path) -> FileTokenizer:
    """The tokenizer of a file; InputError where there is none."""
    try:
        return FileTokenizer(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"tokenizer {path} cannot be read ({error.strerror}); give a tokenizer.json") from error


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise InputError("a tokenizer.json needs the package tokenizers, which is missing; install it") from error
    return tokenizers


def _utf8(text: str) -> bytes:
    """Lone surrogates, which JSON can hold and UTF-8 cannot, become question marks."""
    return text.encode(errors="replace")


def _uncovered(text: str, spans: np.ndarray) -> str:
    """The first characters together that no span covers and that a tokenizer may not remove."""
    begun = np.bincount(spans[:, 0], minlength=len(text) + 1) - np.bincount(spans[:, 1], minlength=len(text) + 1)
    bare = np.flatnonzero(np.cumsum(begun)[:-1] <= 0).tolist()
    lost = [at for at in bare if not _may_go(text[at])]
    run = [at for number, at in enumerate(lost[:20]) if at == lost[0] + number]
    return "".join(text[at] for at in run)


def _may_go(character: str) -> bool:
    """Whether a tokenizer's rules may remove it without loss to a reader."""
    return character.isspace() or character == "\ufffd" or unicodedata.category(character) in _REMOVABLE


def _checked(ids: Sequence[int] | np.ndarray, end: int) -> np.ndarray:
    values = np.asarray(ids, dtype=np.int64)
    outside = values[(values < 0) | (values >= end)]
    if outside.size:
        raise InputError(f"text ids must be in 0..{end - 1}, got {outside[0]}; remove special tokens before decoding")
    return values
