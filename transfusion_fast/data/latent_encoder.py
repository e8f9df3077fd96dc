"""The interface of frozen encoders from pixels to latents, each a model in a local folder.

On a CPU they run in fp32 and one thread, so that neither the number of cores nor bf16 support changes a bit. On a GPU
they run in bf16, as fp16 overflows in some of these models. Weights are read from safetensors alone, as a pickle can
run code. The packages of the models take seconds to import, which happens when a model is first read.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.errors import InputError
from transfusion_fast.files import parse_json

CONFIG = "config.json"
_SETTINGS = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class LatentEncoder(ABC):
    """A frozen encoder in a folder, without its weights.

    Picklable: each process reads the weights when it first needs them.
    """

    folder: Path
    fingerprint: str
    """sha256 of the settings and the weights, as hexadecimal digits."""
    channels: int
    """Channels of its latents."""
    stride: int
    """Pixels a side of one latent value."""
    device: str
    """Device of every process that it is sent to: "cuda" or "cpu"."""
    kind: ClassVar[str]
    """Name of such encoders in messages."""
    weights: ClassVar[str]
    """Name of the one file of weights in the folder."""
    settings: ClassVar[dict[str, str]]
    """Names of the JSON files in the folder, and what to give in place of a folder that lacks one."""

    @abstractmethod
    def encode(self, pixels: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Encode uint8 [n, height, width, 3] to float16 [n, h, w, channels]; sides must be multiples of `stride`.

        An encoder that gives distributions returns their mean, or a sample of them with `noise`, fp32
        [n, h, w, channels]. Values beyond float16 become infinite.
        """

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
        """Return the model in a folder, and the names of the weights that its file lacks or its config does not know.

        Any error of the libraries that read it may be raised.
        """

    @property
    def model(self) -> Any:
        """The model on the device, read when a process first needs it."""
        return _loaded(type(self), self.folder, self.fingerprint, self.device)

    def modality(self, name: str, patch_size: int) -> ModalityInfo:
        """Return the modality of the latents."""
        return ModalityInfo(name, self.channels, patch_size, "latents", self.fingerprint)

    def check_made(self, fingerprint: str, channels: int, what: str) -> None:
        """Raise InputError if another encoder made the latents of `what`; an empty fingerprint is unknown."""
        if fingerprint not in ("", self.fingerprint) or channels != self.channels:
            raise InputError(
                f"{self.kind} of {what} must have fingerprint {fingerprint[:12] or 'unknown'} and {channels} channels, "
                f"got {self.fingerprint[:12]} and {self.channels} in {self.folder}; "
                "give the folder that its data was prepared with"
            )


def fingerprint_of(encoder: type[LatentEncoder], folder: Path) -> str:
    """Digest weights and settings, except notes (names with _, a version) of the model's origin; InputError if invalid.

    Libraries would read an index of several files before the one file, and a pickle if there are no safetensors.
    """
    settings = []
    for name, remedy in encoder.settings.items():
        if not (path := folder / name).is_file():
            raise InputError(f"{encoder.kind} {folder} must be a folder with {name}, got none; {remedy}")
        settings.append(parse_json(_SETTINGS, path.read_bytes(), str(path), f"give another {encoder.kind}"))
    names = sorted(path.name for path in folder.iterdir())
    variants = sorted(path.name for path in folder.glob(f"{Path(encoder.weights).stem}.*.safetensors"))
    if variants and encoder.weights not in names:
        raise InputError(
            f"weights of {folder} must be in {encoder.weights}, got only the variant {variants[0]}; copy it to that "
            "name"
        )
    if encoder.weights not in names or f"{encoder.weights}.index.json" in names:
        raise InputError(
            f"weights of {folder} must be one file {encoder.weights}, never a pickle, got {', '.join(names):.200}; "
            "convert them with save_pretrained(.., safe_serialization=True)"
        )
    sha256 = hashlib.sha256()
    for own in settings:
        own = {name: own[name] for name in own if not name.startswith("_") and name != "transformers_version"}
        sha256.update(json.dumps(own, sort_keys=True).encode())
    with (folder / encoder.weights).open("rb") as file:
        sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()


@lru_cache(maxsize=1)
def _loaded(encoder: type[LatentEncoder], folder: Path, fingerprint: str, device: str) -> Any:
    """Return the model on a device. The fingerprint is in the cache's key, so that a changed folder is noticed."""
    if fingerprint_of(encoder, folder) != fingerprint:
        raise InputError(f"{encoder.kind} {folder} must not change while it is in use, got other files; start again")
    try:
        model, wrong = encoder.load(folder, torch.float32 if device == "cpu" else torch.bfloat16)
        model = model.to(device).eval()
    except InputError:
        raise
    except (
        OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, ImportError, AttributeError,
        SafetensorError,
    ) as error:  # fmt: skip
        line = " ".join(str(error).split())
        raise InputError(
            f"{encoder.kind} {folder} must be readable, got {line:.200}; copy it or save it again"
        ) from error
    # Libraries leave weights that the file lacks at random values.
    if wrong:
        raise InputError(f"weights in {folder} must be those of its config, got a difference in {wrong[0]}; save again")
    return model


def device_of_latents() -> str:
    """Return the device on which encoders run here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, as the number of threads changes the last digit of sums; processes use the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
