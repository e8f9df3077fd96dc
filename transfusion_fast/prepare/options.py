"""Options of the commands of `train/prepare.py`, as argparse takes them, and which of them each kind of command has."""

import argparse
import math
import os
import shutil
from pathlib import Path
from typing import Any, get_args

from transfusion_fast.cpus import usable_cpus
from transfusion_fast.data.shards import PACKS_PER_SHARD
from transfusion_fast.prepare.encode import BadImages
from transfusion_fast.prepare.examples.fashion import DEBIAN, WEB
from transfusion_fast.prepare.images import BATCH
from transfusion_fast.prepare.sources.pairs import CAPTION_FIELDS


def local_path(text: str) -> Path:
    """Return a local path; Path would silently drop one of the slashes of a URL."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"files and folders must be local, got {text!r}; only --out and training take URLs"
        )
    return Path(text)


OPTIONS: dict[str, dict[str, Any]] = {
    "files": {"type": local_path, "nargs": "+", "metavar": "FILE", "help": "files, or folders of them"},
    "folder": {"type": local_path, "metavar": "FOLDER", "help": "data folder, local"},
    "out": {"type": local_path, "metavar": "OUT", "help": "folder to make; gets train/ and heldout/"},
    "--out": {"required": True, "metavar": "OUT", "help": "folder to make, or its URL; run again to resume"},
    "--work": {
        "type": local_path, "metavar": "FOLDER",
        "help": "with a URL as --out: local folder to prepare the data in; it is removed after the upload",
    },
    "--seq-len": {
        "type": int, "default": 4096,
        "help": "length of a pack in text ids, image patches and special tokens (default: %(default)s)",
    },
    "--long": {
        "choices": ("split", "reject"),
        "help": "split documents longer than a pack where a reader pauses, or leave them out (default: split; for "
        "pairs reject; for repack the setting of FOLDER)",
    },
    "--packs-per-shard": {"type": int, "default": PACKS_PER_SHARD, "help": "packs in a file (default: %(default)s)"},
    "--processes": {
        "type": int, "default": usable_cpus(),
        "help": "number of processes (default: one for each CPU, here %(default)s)",
    },
    "--part": {
        "metavar": "I/N",
        "help": "on each of N machines: read the I-th of N parts; the last one writes OUT, on a disk that all share",
    },
    "--source": {
        "default": DEBIAN if shutil.which("apt-get") else WEB, "metavar": f"{DEBIAN}|{WEB}|PATH",
        "help": f"origin of Fashion-MNIST: {DEBIAN} downloads Debian's package, {WEB} its authors' files; or a folder "
        "of the files, or a .deb (default here: %(default)s)",
    },
    "--tokenizer": {"type": local_path, "metavar": "JSON", "help": "a tokenizer.json (default: bytes)"},
    "--heldout": {
        "type": float, "default": 0.0, "metavar": "SHARE",
        "help": "share of the documents to hold out for validation, such as 0.01, by a hash of their content; OUT gets "
        "train/ and heldout/ (default: none)",
    },
    "--limit": {
        "type": int, "metavar": "N",
        "help": "use the first N documents alone, before long ones are split, and read no further (default: all)",
    },
    "--limit-tokens": {
        "type": int, "metavar": "N",
        "help": "use the first documents that take at most N tokens together, and read no further (default: all)",
    },
    "--dedup": {
        "choices": ("documents", "images"),
        "help": "leave out documents whose texts and image files, or whose image files alone, are those of an earlier "
        "document (default: none)",
    },
    "--train-bpe": {"type": int, "metavar": "VOCAB", "help": "train a tokenizer on these texts"},
    "--field": {
        "default": "text", "help": "field of the text in records, or column; a.b is b of object a (default: text)",
    },
    "--caption-field": {
        "metavar": "NAME",
        "help": "field, column or extension of the caption; a.b is b of object a; of a list one is drawn (default: the "
        f"first of {', '.join(CAPTION_FIELDS)})",
    },
    "--image-field": {
        "metavar": "NAME",
        "help": "field, column or extension of the image (default: the first of the usual names: image, jpg, path, ..)",
    },
    "--image-root": {
        "type": local_path, "metavar": "FOLDER",
        "help": "folder that the paths of images are relative to (default: that of the file that holds them)",
    },
    "--bad-images": {
        "choices": get_args(BadImages), "default": "reject",
        "help": "leave out a document with an image that is missing or cannot be used, or only that image (default: "
        "%(default)s)",
    },
    "--separator": {
        "type": os.fsencode, "default": b"", "metavar": "TEXT",
        "help": "text between the documents of a .txt file, such as '<|endoftext|>' (default: a file is one document)",
    },
    "--image-size": {
        "type": int, "help": "side of an image in pixels (default: 256, with --encoder the size it was made for)",
    },
    "--patch-size": {
        "type": int,
        "help": "side of a patch: in pixels (default: 16; digits 4, clothes 4), with --vae in latents (default: 2), "
        "with --encoder in features (default: 1)",
    },
    "--where": {
        "action": "append", "default": [], "metavar": "CONDITION",
        "help": "use only documents whose record meets the condition, such as 'similarity > 0.3' or "
        "'scores.language == \"en\"' (< <= > >= == !=); repeat it for conditions that must all be met",
    },
    "--min-side": {
        "type": int, "default": 1, "metavar": "N", "help": "leave out documents with an image whose shorter side has "
        "fewer pixels",
    },
    "--max-aspect": {
        "type": float, "default": math.inf, "metavar": "R",
        "help": "leave out documents with an image whose longer side is more than R times the shorter one",
    },
    "--caption-length": {
        "default": "0:", "metavar": "MIN:MAX",
        "help": "leave out captions of fewer or more characters; MIN or MAX may be missing",
    },
    "--interleaved": {"action": "store_true", "help": "documents of several digits, each after its name"},
    "--shape": {
        "choices": ("crop", "buckets", "native"), "default": "crop",
        "help": "crop: the middle square; buckets: the nearest of a few rectangles of up to SIZE x SIZE pixels; "
        "native: the image's own shape, scaled down to at most so many pixels (default: %(default)s)",
    },
    "--vae": {
        "type": local_path, "metavar": "FOLDER",
        "help": "autoencoder of the latents to store or to show: the folder of an AutoencoderKL (diffusers' format, "
        "safetensors); every process loads its own copy, and processes share the GPUs if there are any",
    },
    "--latents": {
        "choices": ("sampled", "mean"),
        "help": "with --vae: sampled draws from the posterior with noise keyed by the image, as in the training of the "
        "decoder; mean takes its mean (default: sampled)",
    },
    "--vae-batch": {
        "type": int, "metavar": "N",
        "help": "with --vae or --encoder: images at a time; on a CPU one is as fast and takes less memory "
        f"(default: {BATCH})",
    },
    "--encoder": {
        "type": local_path, "metavar": "FOLDER",
        "help": "frozen vision encoder whose patch features to store: a transformers model (safetensors) with its "
        "image processor; no decoder turns what a model draws of them into pictures",
    },
    "--encoder-like": {
        "type": local_path, "metavar": "OTHER",
        "help": "with --encoder: data folder whose normalisation of the features to use, such as that of the training "
        "data for validation data (default: measured on these images)",
    },
    "--picture": {"type": local_path, "metavar": "PNG", "help": "draw the lengths of its documents"},
    "--like": {
        "type": local_path, "metavar": "OTHER",
        "help": "data folder of the same tokenizer, modalities and pack length (default: FOLDER's own index)",
    },
    "--accept": {"action": "store_true", "help": "accept shards that differ from the old index"},
    "--pack": {"type": int, "default": 0, "metavar": "N", "help": "number of the pack (default: %(default)s)"},
    "--epoch": {"type": int, "default": 0, "help": "epoch whose order and noise are shown (default: %(default)s)"},
    "--seed": {"type": int, "default": 0, "help": "train.seed of the run (default: %(default)s)"},
}  # fmt: skip
OUTPUT = ("--out", "--work", "--seq-len", "--long", "--packs-per-shard", "--processes", "--part")
TOKENS = ("--tokenizer", "--train-bpe")
CHOICE = ("--where", "--limit", "--limit-tokens", "--dedup", "--heldout")
IMAGES = ("--image-size", "--patch-size", "--shape", "--min-side", "--max-aspect")
LATENTS = ("--vae", "--latents", "--vae-batch", "--encoder", "--encoder-like")
CAPTIONS = ("--caption-field", "--image-field", "--image-root", "--caption-length")
_SECTIONS = {
    "what is read": ("--field", "--separator", "--caption-field", "--image-field", "--image-root"),
    "which documents are used": (*CHOICE, "--caption-length", "--min-side", "--max-aspect", "--bad-images", "--long"),
    "text": TOKENS,
    "images": ("--image-size", "--patch-size", "--shape", *LATENTS),
}
"""Options by the section of --help that shows them; the others are shown first."""


def add_options(command: argparse.ArgumentParser, *names: str) -> None:
    """Add options to a command, in sections if they are many."""
    sections = {}
    for name in names:
        title = next((title for title, own in _SECTIONS.items() if name in own), "")
        if title and title not in sections and len(names) > 10:
            sections[title] = command.add_argument_group(title)
        sections.get(title, command).add_argument(name, **OPTIONS[name])
