"""Text to token ids: the byte tokenizer, and the fingerprint by which a data folder names its tokenizer."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from transfusion_fast.errors import InputError


class ByteTokenizer:
    """UTF-8 bytes as token ids 0..255; special tokens are not its business."""

    name = "bytes"
    num_text_tokens = 256

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text` as int32 [n]."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. InputError for an id outside 0..255."""
        values = np.asarray(ids, dtype=np.int64)
        outside = values[(values < 0) | (values >= self.num_text_tokens)]
        if outside.size:
            raise InputError(f"text ids must be in 0..255, got {outside[0]}; remove special tokens before decoding")
        return values.astype(np.uint8).tobytes().decode(errors="replace")

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of a canonical description: equal exactly where two tokenizers give equal ids."""
        description = {"name": self.name, "num_text_tokens": self.num_text_tokens, "encoding": "utf-8"}
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """What a data folder's index says of its tokenizer."""
        return {"name": self.name, "num_text_tokens": self.num_text_tokens, "sha256": self.fingerprint}


def load_tokenizer(description: Mapping[str, str | int]) -> ByteTokenizer:
    """The tokenizer that an index describes; InputError where it is unknown, or not the one known by that name."""
    tokenizer = ByteTokenizer()
    if description.get("name") != tokenizer.name:
        raise InputError(
            f"tokenizer must be {tokenizer.name!r}, got {description.get('name')!r}; prepare the data again with it"
        )
    for field, value in tokenizer.describe().items():
        if description.get(field) != value:
            raise InputError(
                f"{field} of tokenizer {tokenizer.name!r} must be {value!r}, got {description.get(field)!r}; "
                "the data was made with another tokenizer: prepare it again"
            )
    return tokenizer
