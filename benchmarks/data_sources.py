"""Sources of random texts and pictures on which preparing is measured."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image

from transfusion_fast.data.tokenizer import FileTokenizer, train_bpe

SEED = 0
SMALL, LARGE = (400, 500), (1536, 2048)
"""Height and width of a picture from the web, and of a photograph of three megapixels."""
_LETTERS = np.frombuffer(b"etaoinshrdlcumwfgypbvk", "S1")


def make_words(number: int = 40_000) -> list[str]:
    """Return words of two to nine letters."""
    rng = np.random.default_rng(SEED)
    return [b"".join(rng.choice(_LETTERS, rng.integers(2, 10))).decode() for _ in range(number)]


def make_texts(words: Sequence[str], lengths: np.ndarray) -> list[str]:
    """Return texts of so many words each, a sentence for every twelve; a few words are frequent, as in language."""
    drawn = np.minimum(np.random.default_rng(SEED).zipf(1.3, lengths.sum()) - 1, len(words) - 1)
    return [" ".join(_sentences(words, own.tolist())) for own in np.split(drawn, np.cumsum(lengths)[:-1])]


def _sentences(words: Sequence[str], drawn: list[int]) -> Iterator[str]:
    for first in range(0, len(drawn), 12):
        yield " ".join(words[i] for i in drawn[first : first + 12]) + "." * (first + 12 < len(drawn))


def web_lengths(number: int) -> np.ndarray:
    """Return the lengths of web texts in words: 400 on the median, one in twenty above 2,000."""
    return np.random.default_rng(SEED).lognormal(6, 1, number).astype(int) + 1


def make_tokenizer(texts: Sequence[str], vocabulary: int, special: int) -> FileTokenizer:
    """Return a tokenizer that is trained on texts, and has special tokens besides."""
    library = tokenizers.Tokenizer.from_buffer(train_bpe(texts, vocabulary).content)
    library.add_special_tokens([f"<|special {n}|>" for n in range(special)])
    return FileTokenizer(library.to_str().encode())


def make_jpegs(size: tuple[int, int], number: int) -> list[bytes]:
    """Return pictures of smooth noise with some grain, about as large as photographs of this height and width are."""
    rng = np.random.default_rng(SEED)
    height, width = size
    files = []
    for _ in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-8, 9, (height, width, 1), dtype=np.int16)
        stream = io.BytesIO()
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
        files.append(stream.getvalue())
    return files


def write_json_lines(path: Path, texts: Sequence[str]) -> None:
    """Write one text a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_tar(path: Path, pairs: Iterator[tuple[bytes, str]]) -> None:
    """Write pictures and their captions as WebDataset does."""
    with tarfile.open(path, "w") as archive:
        for number, (picture, caption) in enumerate(pairs):
            for extension, data in (("jpg", picture), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
