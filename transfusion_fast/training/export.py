"""A trained model as a folder of its own, without the state of training, for `Transfusion.from_pretrained`.

OUT/model.safetensors   weights, fp32; see model/weights.py for models of more than 5 GB
OUT/config.json         settings of the model and of the layout of its data, the step, and which weights these are
OUT/data.json           tokenizer, modalities with their autoencoder and patch size, and image sizes, as in a run folder
OUT/tokenizer.json      the tokenizer, unless it is that of bytes
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import psutil

from transfusion_fast.errors import InputError
from transfusion_fast.files import sync
from transfusion_fast.model.transfusion import MODEL_CONFIG
from transfusion_fast.model.weights import MAX_FILE_BYTES, write_weights
from transfusion_fast.training.checkpoint_files import open_weights, read_meta
from transfusion_fast.training.run_folder import LAYOUT, read_data_description, write_data_description


def export_model(
    run: Path, checkpoint: Path, out: Path, *, raw: bool = False, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write a run's model to a new folder, which appears under its name when it is complete.

    Args:
        raw: take the weights of the last step, even if the run keeps an average of the weights.

    Raises:
        InputError: the folder exists and is not empty, or the checkpoint is damaged.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"OUT must be a new or empty folder, got {out}, which exists; give another")
    data, meta, weights = read_data_description(run), read_meta(checkpoint), open_weights(checkpoint, raw=raw)
    config = {
        "model_type": "transfusion_fast",
        "model": data.completed(meta.config.model).model_dump(mode="json"),
        "data": meta.config.data.model_dump(mode="json", include=set(LAYOUT)),
        "weights": "average" if weights.averaged else "last step",
        "step": meta.step,
        "packs_consumed": meta.packs_consumed,
        "versions": meta.versions,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.*"):  # by an export that was killed
        if left.suffix[1:].isdigit() and not psutil.pid_exists(int(left.suffix[1:])):
            shutil.rmtree(left)
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    staging.mkdir()
    try:
        write_weights(staging, weights, max_file_bytes)
        write_data_description(staging, data)
        (staging / MODEL_CONFIG).write_text(json.dumps(config, indent=1))
        sync(*staging.iterdir(), staging)
        os.rename(staging, out)  # fails if somebody has filled the folder meanwhile
    finally:
        shutil.rmtree(staging, ignore_errors=True)
