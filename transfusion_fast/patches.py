"""Latent images to patch vectors and back; works on numpy arrays and tensors alike."""

from __future__ import annotations

from typing import TypeVar

from einops import rearrange

Array = TypeVar("Array")


def patchify(images: Array, patch_size: int) -> Array:
    """[N, height, width, channels] -> [N * patches, patch_size^2 * channels], patches row by row.

    Both sides must be multiples of the patch size (einops raises otherwise).
    """
    return rearrange(images, "n (i p) (j q) c -> (n i j) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Array, height: int, width: int, patch_size: int) -> Array:
    """The inverse of `patchify` for N images of one size, given in values: -> [N, height, width, channels]."""
    return rearrange(
        patches, "(n i j) (p q c) -> n (i p) (j q) c",
        i=height // patch_size, j=width // patch_size, p=patch_size, q=patch_size,
    )  # fmt: skip
