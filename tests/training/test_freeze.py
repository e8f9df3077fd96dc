"""Frozen text weights and dropout: what keeps its bits, what has state, and runs that resume."""

import shutil
from pathlib import Path

import pytest
import torch
from launching import state_of, train
from printed_seeds import print_seeds, seeds_in

from transfusion_fast.config import Config
from transfusion_fast.config_reading import load_config
from transfusion_fast.errors import InputError
from transfusion_fast.model.grouped_layers import of_text
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.training.checkpoint_files import find_checkpoint, open_slices
from transfusion_fast.training.engine import freeze_text
from transfusion_fast.training.run_folder import load_model
from transfusion_fast.training.stored_slices import WEIGHT

BLOCKS = "{dim: 32, depth: 2, heads: 2, ffn_dim: 64, modality_weights: separate, conditioning: adaln, dropout: 0.2}"
FROZEN = (f"model.transformer={BLOCKS}", "train.freeze=text")


def forget_after(run: Path, step: int) -> Path:
    """Copy a run as it was at a step."""
    copy = Path(shutil.copytree(run, run.with_name(f"from-{step}")))
    for later in range(step + 2, 8, 2):
        shutil.rmtree(copy / "checkpoints" / f"step-{later:08d}")
    (copy / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    return copy


def test_text_is_frozen_without_state_and_a_run_with_dropout_resumes_with_the_same_bits(
    digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    seeds = seeds_in(train(2, digits, run, *FROZEN, setup=print_seeds))
    assert len(seeds) == len(set(seeds)) == 6 * 4, "every micro-batch has a dropout of its own"
    first, last = (load_model(find_checkpoint(run, f"step-0000000{n}"), raw=True).state_dict() for n in (2, 6))
    average = load_model(find_checkpoint(run)).state_dict()
    stored = open_slices(find_checkpoint(run))
    for name, weight in last.items():
        assert torch.equal(weight, first[name]) == of_text(name), name
        assert torch.equal(weight, average[name]) == of_text(name), name
        kinds = stored._slices[name][0].starts.keys()
        assert (kinds == {WEIGHT}) == of_text(name), name
    resumed = forget_after(run, 2)
    train(2, digits, resumed, *FROZEN)
    assert state_of(resumed, 6) == state_of(run, 6)
    divided = forget_after(run, 4)
    of_one_rank = seeds_in(train(1, digits, divided, *FROZEN, "train.zero_stage=1", setup=print_seeds))
    assert len(of_one_rank) == 2 * 4 and set(of_one_rank) < set(seeds), "whatever rank it is on"
    for name, weight in load_model(find_checkpoint(divided), raw=True).state_dict().items():
        torch.testing.assert_close(weight, last[name], rtol=0, atol=0 if of_text(name) else 1e-4)


def test_what_only_patches_pass_is_trained_with_frozen_text() -> None:
    blocks = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 32, "modality_weights": "separate", "conditioning": "adaln"}
    model = Transfusion(num_text_tokens=8, dim_latent=(4, 6), transformer=blocks)
    freeze_text(model)
    for name, parameter in model.named_parameters():
        of_patches = name.startswith(("codecs", "conditions", "norm.modalities", "blocks.0.modalities"))
        assert parameter.requires_grad == of_patches, name


def test_freezing_what_text_does_not_own_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs model\.transformer\.modality_weights=separate, got shared"):
        load_config(None, ["train.freeze=text"])
    config = Config(model={"dim_latent": [], "transformer": {"dim": 32, "modality_weights": "separate"}})
    with pytest.raises(InputError, match="must come with a modality, got data of text alone"):
        freeze_text(Transfusion(config.model))
