"""Exported folders: the model of a run without the state of training, which every command takes for a run."""

import json
import os
from pathlib import Path

import pytest
import torch

from transfusion_fast import Transfusion
from transfusion_fast.errors import InputError
from transfusion_fast.training import export
from transfusion_fast.training.checkpoint_files import find_checkpoint
from transfusion_fast.training.export import export_model
from transfusion_fast.training.run_folder import load_model, open_model


def assert_same_model(one: Transfusion, other: Transfusion) -> None:
    assert one.config == other.config
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())


@pytest.mark.parametrize("raw", [False, True])
def test_an_exported_folder_holds_the_average_or_the_last_weights(
    uninterrupted: Path, tmp_path: Path, command, raw: bool
) -> None:
    out = tmp_path / "new" / "model"
    code, printed, _ = command("export", uninterrupted, out, *["--raw"] * raw, "--checkpoint", "step-00000004")
    checkpoint = find_checkpoint(uninterrupted, "step-00000004")
    assert (code, printed) == (0, f"exported {checkpoint}: {out}\n")
    model = Transfusion.from_pretrained(out)
    assert_same_model(model, load_model(checkpoint, raw=raw))
    assert_same_model(model, open_model(out))
    config = json.loads((out / "config.json").read_text())
    assert (config["weights"], config["step"]) == ("last step" if raw else "average", 4)
    assert (out / "data.json").read_bytes() == (uninterrupted / "data.json").read_bytes()
    assert sorted(os.listdir(out)) == ["config.json", "data.json", "model.safetensors"]
    assert os.listdir(out.parent) == ["model"]


def test_a_large_model_is_exported_in_several_files(uninterrupted: Path, tmp_path: Path) -> None:
    export_model(uninterrupted, find_checkpoint(uninterrupted), tmp_path / "out", max_file_bytes=20_000)
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 3
    assert_same_model(Transfusion.from_pretrained(tmp_path / "out"), load_model(find_checkpoint(uninterrupted)))


def test_an_export_overwrites_nothing_and_leaves_nothing_behind_when_it_fails(
    uninterrupted: Path, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis"):
        code, _, err = command("export", uninterrupted, out)
        assert (
            code == 2 and err == f"export: OUT must be a new or empty folder, got {out}, which exists; give another\n"
        )

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "write_data_description", fail)
    with pytest.raises(OSError, match="no space"):
        export_model(uninterrupted, find_checkpoint(uninterrupted), tmp_path / "new")
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == ["thesis"]


def test_an_export_has_no_checkpoints_and_one_set_of_weights(uninterrupted: Path, tmp_path: Path, command) -> None:
    out = tmp_path / "out"
    export_model(uninterrupted, find_checkpoint(uninterrupted), out)
    for options in (["--raw"], ["--checkpoint", "step-00000004"]):
        code, _, err = command("sample", out, "--text", "one", "--out", tmp_path / "grid.png", *options)
        assert code == 2 and f"must come from a run, got {out}, an exported folder" in err and err.count("\n") == 1
    code, _, err = command("export", out, tmp_path / "again")
    assert code == 2 and f"{out}: holds no finished checkpoint" in err
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"must be a folder that train/export\.py wrote, got no config\.json of"):
        Transfusion.from_pretrained(out)


def test_evaluation_of_an_export_needs_its_data_and_writes_nothing_into_it(
    uninterrupted: Path, digits: Path, tmp_path: Path, command
) -> None:
    out, picture = tmp_path / "out", tmp_path / "drawn" / "samples.png"
    export_model(uninterrupted, find_checkpoint(uninterrupted), out)
    before = sorted(os.listdir(out))
    code, _, err = command("evaluate", out, "--data", digits.parent)
    assert code == 2 and f"--data and --out must be given for {out}, an exported folder" in err
    options = ("--data", digits.parent, "--out", picture, "--each", 1, "--steps", 1)
    assert command("evaluate", out, *options)[0] == 0
    assert sorted(os.listdir(out)) == before and sorted(os.listdir(picture.parent)) == ["samples.json", "samples.png"]
