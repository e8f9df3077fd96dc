"""The command lines: what they print and write, and the one line that bad input gets."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from launching import train
from PIL import Image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, in a folder with the digits it was trained on."""
    from transfusion_fast.prepare.examples.built_in import prepare_splits
    from transfusion_fast.prepare.examples.digits import Digits

    folder = tmp_path_factory.mktemp("commands")
    prepare_splits(Digits(), folder / "digits", sequence_length=128, packs_per_shard=16)
    train(1, folder / "digits" / "train", folder / "run", "train.steps=2")
    return folder / "run"


def test_sample_draws_a_picture_of_the_prompts(run: Path, tmp_path: Path, command) -> None:
    picture = tmp_path / "new" / "grid.png"
    code, out, _ = command("sample", run, "--prompt", "seven", "two", "--each", 2, "--steps", 2, "--out", picture)
    assert code == 0 and f"drew 4 images of 8 x 8: {picture}" in out
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors(256) or []) > 8  # noise and captions, not one flat colour


def test_sampling_again_with_the_same_seed_draws_the_same_picture(run: Path, tmp_path: Path, command) -> None:
    pictures = [tmp_path / f"{n}.png" for n in range(3)]
    for picture, seed in zip(pictures, (1, 1, 2), strict=True):
        command("sample", run, "--prompt", "one", "--each", 1, "--steps", 2, "--seed", seed, "--out", picture)
    one, again, other = ([*Image.open(p).tobytes()] for p in pictures)
    assert one == again != other


def test_sample_captions_image_files_and_goes_on_with_text(run: Path, tmp_path: Path, command) -> None:
    file = tmp_path / "digit.png"
    Image.fromarray(np.zeros((30, 20, 3), dtype=np.uint8)).save(file)
    code, out, _ = command("sample", run, "--caption", file, "--max-tokens", 3)
    assert code == 0 and out.startswith(f"{file}: ")
    picture = tmp_path / "drawn.png"
    code, out, _ = command("sample", run, "--text", "two plus", "--max-tokens", 3, "--steps", 2, "--out", picture)
    assert code == 0 and out.startswith("two plus")


def test_evaluate_prints_three_numbers_and_writes_them_down(run: Path, command) -> None:
    code, out, _ = command("evaluate", run, "--each", 1, "--steps", 2)
    report = json.loads((run / "evaluation.json").read_text())
    assert code == 0 and (run / "samples.png").is_file()
    assert report["num_generated"] == 10 and report["num_captioned"] == 300
    for number in ("generated_accuracy", "caption_accuracy", "text_perplexity"):
        assert f"{report[number]:.3f}" in out
    assert report["classifier_accuracy"] > 0.95
    assert 0 <= report["generated_accuracy"] <= 1 and report["text_perplexity"] > 1


def damaged(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    weights = copy / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0xFF
    weights.write_bytes(data)
    return copy


def test_weights_that_do_not_match_the_manifest_are_not_sampled_from(run: Path, tmp_path: Path, command) -> None:
    code, _, err = command("sample", damaged(run, tmp_path / "copy"), "--prompt", "one")
    assert code == 2 and err.count("\n") == 1
    assert "is damaged (model.safetensors: not as manifest.json says)" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sample", "nowhere", "--prompt", "one"], "nowhere: is not a run folder"),
        (["sample", "RUN", "--prompt", "one", "--steps", "0"], "diffusion steps must be at least 1, got 0"),
        (["sample", "RUN", "--prompt", "one", "--checkpoint", "../x"], "has no checkpoint '../x'"),
        (
            ["sample", "RUN", "--caption", __file__],
            "must be a readable image (not an image: must be JPEG, PNG, WEBP)",
        ),
        (["sample", "RUN", "--prompt", "one", "--guidance", "nan"], "guidance weight must be finite, got nan"),
        (["sample", "RUN", "--text", "one", "--temperature", "nan"], "--temperature must be at least 0, got nan"),
        (["sample", "RUN", "--prompt", "one", "--vae", "x"], "--vae needs a run on latents, got"),
        (["evaluate", "nowhere"], "nowhere: is not a run folder"),
        (["evaluate", "RUN", "--data", "nowhere"], "evaluation needs a folder with train/ and heldout/"),
        (["evaluate", "RUN", "--each", "0"], "--each must be at least 1, got 0"),
        (["pretrain", "nowhere.yaml"], "config nowhere.yaml: cannot be read"),
        (["pretrain", "train.step=3"], "unknown key 'train.step'; did you mean 'steps'?"),
        (["pretrain", "optimizer.lr=-1"], "optimizer.lr: Input should be greater than 0, got -1"),
        (["pretrain", "data.path=nowhere"], "nowhere"),
        (["pretrain", "config.yaml", "steps"], "override must be section.key=value, got 'steps'"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run: Path, tmp_path: Path, monkeypatch, command, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("train: {steps: 3}")
    code, _, err = command(*(str(run) if a == "RUN" else a for a in arguments))
    assert code == 2 and complaint in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.output=/dev/null", "train.output must be new, empty or the folder of a run, got /dev/null"),
    ],
)
def test_what_training_cannot_do_is_said_before_any_work(run: Path, command, override: str, complaint: str) -> None:
    code, _, err = command("pretrain", f"data.path={run.parent / 'digits' / 'train'}", override)
    assert code == 2 and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize("output", ["mine", "mine/config.yaml"])
def test_training_does_not_write_over_a_folder_that_is_no_run(run: Path, tmp_path: Path, command, output: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("config.yaml", "data.json"):
        (mine / name).write_text("my own")
    data = run.parent / "digits" / "train"
    code, _, err = command("pretrain", f"data.path={data}", f"train.output={tmp_path / output}")
    assert code == 2 and err.count("\n") == 1 and str(mine) in err
    assert {p.name: p.read_text() for p in mine.iterdir()} == {"config.yaml": "my own", "data.json": "my own"}


def test_a_picture_is_written_where_it_was_asked_for_or_not_at_all(run: Path, tmp_path: Path, command) -> None:
    code, _, _ = command("sample", run, "--prompt", "one", "--each", 1, "--steps", 1, "--out", tmp_path / "picture")
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["picture"]
    for out, complaint in ((tmp_path, "is a folder"), (tmp_path / "picture" / "x.png", "cannot be made")):
        code, _, err = command("sample", run, "--prompt", "one", "--out", out)
        assert code == 2 and complaint in err and err.count("\n") == 1


def test_an_image_bomb_is_refused_by_its_header(run: Path, tmp_path: Path, command) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)))
    code, _, err = command("sample", run, "--caption", bomb)
    assert code == 2 and "bomb.png" in err and err.count("\n") == 1


def test_pretrain_refuses_other_versions_and_truncated_shards(run: Path, tmp_path: Path, command) -> None:
    data = tmp_path / "data"
    shutil.copytree(run.parent / "digits" / "train", data)
    index = json.loads((data / "index.json").read_text())
    (data / "index.json").write_text(json.dumps({**index, "version": 99}))
    code, _, err = command("pretrain", f"data.path={data}")
    assert code == 2 and "99" in err and err.count("\n") == 1
    (data / "index.json").write_text(json.dumps(index))
    shard = data / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
    code, _, err = command("pretrain", f"data.path={data}")
    assert code == 2 and "shard-000000.tar" in err and err.count("\n") == 1


def test_a_picture_to_caption_is_read_as_training_pictures_are(run: Path, tmp_path: Path, command) -> None:
    picture = np.zeros((16, 32, 4), np.uint8)
    picture[:, 8:24] = (200, 200, 200, 255)  # the middle; the rest is transparent
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(picture[:, 8:24, :3]).save(tmp_path / "square.png")
    wide, square = (command("sample", run, "--caption", tmp_path / name) for name in ("wide.png", "square.png"))
    assert wide[0] == square[0] == 0
    assert wide[1].split(": ", 1)[1] == square[1].split(": ", 1)[1]


def test_evaluation_of_stories_is_refused(run: Path, tmp_path: Path, command) -> None:
    from transfusion_fast.data.pack import ImageSegment, TextSegment
    from transfusion_fast.data.tokenizer import ByteTokenizer
    from transfusion_fast.prepare.examples.built_in import prepare
    from transfusion_fast.prepare.examples.digits import MODALITY

    words, image = TextSegment(ByteTokenizer().encode("one")), ImageSegment(np.zeros((8, 8, 1), np.uint8))
    settings = {"sequence_length": 128, "tokenizer": ByteTokenizer(), "modalities": (MODALITY,)}
    for split in ("train", "heldout"):
        prepare([(words, image, words)], tmp_path / "stories" / split, **settings)
    code, _, err = command("evaluate", run, "--data", tmp_path / "stories")
    assert code == 2 and "documents of one image and its caption" in err and err.count("\n") == 1


def test_images_are_drawn_at_the_size_asked_for(run: Path, tmp_path: Path, command) -> None:
    options = ("--prompt", "one", "--each", 1, "--steps", 1, "--out", tmp_path / "grid.png", "--size")
    code, out, _ = command("sample", run, *options, 4, 12)
    assert code == 0 and "drew 1 images of 4 x 12" in out
    code, _, err = command("sample", run, *options, 4, 13)
    assert code == 2 and "--size must be positive multiples of 2, got 4 13" in err


@pytest.mark.parametrize(("name", "complaint"), [("x.txt", "must be a file NAME.png"), ("x.html", "NAME.png")])
def test_a_picture_is_never_written_under_another_kind_of_name(run: Path, tmp_path: Path, command, name, complaint):
    code, _, err = command("sample", run, "--prompt", "one", "--out", tmp_path / name)
    assert code == 2 and complaint in err and not (tmp_path / name).exists()
