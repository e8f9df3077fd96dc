"""The command lines: what they print and write, and the one line that bad input gets."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import train
from PIL import Image

from transfusion_fast.data.images import latents_to_pixels
from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.examples.built_in import prepare, prepare_splits
from transfusion_fast.prepare.examples.digits import MODALITY, Digits
from transfusion_fast.sampling.decoder import ImageSettings, generate_images
from transfusion_fast.sampling.pictures import draw_grid
from transfusion_fast.training.run_folder import find_checkpoint, load_model, read_data_description


class SomeDigits(Digits):
    """Every fifth document of the digits."""

    def documents(self, split, tokenizer):
        return super().documents(split, tokenizer)[::5]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, in a folder with the digits it was trained on."""
    folder = tmp_path_factory.mktemp("commands")
    prepare_splits(SomeDigits(), folder / "digits", sequence_length=128, packs_per_shard=16)
    train(1, folder / "digits" / "train", folder / "run", "train.steps=2")
    return folder / "run"


def test_sample_draws_a_picture_of_the_prompts_where_it_was_asked_to(run: Path, tmp_path: Path, command) -> None:
    picture = tmp_path / "new" / "grid"
    code, out, _ = command("sample", run, "--prompt", "seven", "two", "--each", 2, "--steps", 2, "--out", picture)
    assert code == 0 and f"drew 4 images of 8 x 8: {picture}" in out
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors(256) or []) > 8  # noise and captions, not one flat colour


def test_sampling_again_with_the_same_seed_draws_the_same_picture(run: Path, tmp_path: Path, command) -> None:
    pictures = [tmp_path / f"{n}.png" for n in range(3)]
    for picture, seed in zip(pictures, (1, 1, 2), strict=True):
        command("sample", run, "--prompt", "one", "--each", 1, "--steps", 2, "--seed", seed, "--out", picture)
    one, again, other = (picture.read_bytes() for picture in pictures)
    assert one == again != other


def test_a_prompt_and_a_seed_draw_the_images_of_the_python_interface(run: Path, tmp_path: Path, command) -> None:
    drawn, expected = tmp_path / "drawn.png", tmp_path / "expected.png"
    command("sample", run, "--prompt", "one", "--each", 2, "--steps", 2, "--seed", 3, "--out", drawn)
    data, model = read_data_description(run), load_model(find_checkpoint(run))
    prompt = [torch.from_numpy(data.tokenizer.encode("one")).long()]
    settings = ImageSettings(steps=2, guidance=3.0, eta=1.0, clip=1.0)
    generator = torch.Generator().manual_seed(3)
    latents = generate_images(model, [prompt] * 2, data.grid(0), image=settings, generator=generator)
    draw_grid([("one", [latents_to_pixels(latents.numpy(), patch_size=2)])], expected)
    assert drawn.read_bytes() == expected.read_bytes()


def test_sample_continues_text(run: Path, tmp_path: Path, command) -> None:
    picture = tmp_path / "drawn.png"
    code, out, _ = command("sample", run, "--text", "two plus", "--max-tokens", 3, "--steps", 2, "--out", picture)
    assert code == 0 and out.startswith("two plus")


def test_a_picture_to_caption_is_read_as_training_pictures_are(run: Path, tmp_path: Path, command) -> None:
    picture = np.zeros((16, 32, 4), np.uint8)
    picture[:, 8:24] = (200, 200, 200, 255)  # the middle; the rest is transparent
    captions = []
    for name, pixels in (("wide.png", picture), ("square.png", picture[:, 8:24, :3])):
        Image.fromarray(pixels).save(tmp_path / name)
        code, out, _ = command("sample", run, "--caption", tmp_path / name, "--max-tokens", 9)
        assert code == 0 and out.startswith(f"{tmp_path / name}: ")
        captions.append(out.removeprefix(f"{tmp_path / name}: "))
    assert captions[0] == captions[1]


def test_images_are_drawn_at_the_size_asked_for(run: Path, tmp_path: Path, command) -> None:
    options = ("--prompt", "one", "--each", 1, "--steps", 1, "--out", tmp_path / "grid.png", "--size")
    code, out, _ = command("sample", run, *options, 4, 12)
    assert code == 0 and "drew 1 images of 4 x 12" in out
    code, _, err = command("sample", run, *options, 4, 13)
    assert code == 2 and "--size must be positive multiples of 2, got 4 13" in err


def test_evaluate_prints_the_figures_that_it_writes(run: Path, command) -> None:
    code, out, _ = command("evaluate", run, "--each", 1, "--steps", 2)
    report = json.loads((run / "evaluation.json").read_text())
    assert code == 0 and (run / "samples.png").is_file()
    assert report["num_generated"] == 10 and report["num_captioned"] == 60
    for number in ("generated_accuracy", "caption_accuracy", "text_perplexity", "classifier_accuracy"):
        assert f"{report[number]:.3f}" in out


def test_evaluation_of_documents_with_more_than_an_image_and_its_caption_is_refused(
    run: Path, tmp_path: Path, command
) -> None:
    text, image = TextSegment(ByteTokenizer().encode("one")), ImageSegment(np.zeros((8, 8, 1), np.uint8))
    settings = {"sequence_length": 128, "tokenizer": ByteTokenizer(), "modalities": (MODALITY,)}
    for split in ("train", "heldout"):
        prepare([(text, image, text)], tmp_path / "stories" / split, **settings)
    code, _, err = command("evaluate", run, "--data", tmp_path / "stories")
    assert code == 2 and "documents of one image and its caption" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("sample nowhere --prompt one", "nowhere: is not a run folder"),
        ("sample RUN --prompt one --steps 0", "diffusion steps must be at least 1, got 0"),
        ("sample RUN --prompt one --checkpoint ../x", "has no checkpoint '../x'"),
        ("sample RUN --caption config.yaml", "(not an image: must be JPEG, PNG, WEBP)"),
        ("sample RUN --caption bomb.png", "bomb.png"),  # an image of 60,000 x 60,000 pixels, by its header
        ("sample RUN --prompt one --guidance nan", "guidance weight must be finite, got nan"),
        ("sample RUN --text one --temperature nan", "--temperature must be at least 0, got nan"),
        ("sample RUN --prompt one --vae x", "--vae needs a run on latents, got"),
        ("sample RUN --prompt one --out .", "got the folder ."),
        ("sample RUN --prompt one --out config.yaml/x.png", "cannot be made"),
        ("sample RUN --prompt one --out x.txt", "must be a file NAME.png"),
        ("sample RUN --prompt one --out x.html", "must be a file NAME.png"),
        ("sample damaged --prompt one --out x.png", "is damaged (model.safetensors: not as manifest.json says)"),
        ("evaluate nowhere", "nowhere: is not a run folder"),
        ("evaluate RUN --data nowhere", "evaluation needs a folder with train/ and heldout/"),
        ("evaluate RUN --each 0", "--each must be at least 1, got 0"),
        ("pretrain nowhere.yaml", "config nowhere.yaml: cannot be read"),
        ("pretrain train.step=3", "unknown key 'train.step'; did you mean 'steps'?"),
        ("pretrain optimizer.lr=-1", "optimizer.lr: Input should be greater than 0, got -1"),
        ("pretrain data.path=nowhere", "nowhere"),
        ("pretrain config.yaml steps", "override must be section.key=value, got 'steps'"),
        ("pretrain data.path=DATA train.output=/dev/null", "train.output must be new, empty or the folder of a run"),
        ("pretrain data.path=DATA train.output=.", "train.output must be new, empty or the folder of a run, got ."),
        ("pretrain data.path=DATA train.output=mine", "mine/data.json"),
        ("pretrain data.path=DATA train.output=mine/data.json", "train.output must be new, empty or the folder of a"),
        ("pretrain data.path=future", "99"),
        ("pretrain data.path=cut train.cpu_threads=1", "shard-000000.tar"),  # conftest.py wants one thread as well
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2_and_changes_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command, arguments: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = run.parent / "digits" / "train"
    _write_bad_input(tmp_path, run, data)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = command(*arguments.replace("RUN", str(run)).replace("DATA", str(data)).split())
    assert code == 2 and complaint in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def _write_bad_input(folder: Path, run: Path, data: Path) -> None:
    """Write a config, a folder that is not a run, a damaged run, a decompression bomb, and two bad data folders."""
    (folder / "config.yaml").write_text("train: {steps: 3}")
    (folder / "mine").mkdir()
    (folder / "mine" / "data.json").write_text("my own")
    shutil.copytree(run, folder / "damaged")
    weights = folder / "damaged" / "checkpoints" / "step-00000002" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    for name in ("future", "cut"):
        shutil.copytree(data, folder / name)
    index = json.loads((data / "index.json").read_text())
    (folder / "future" / "index.json").write_text(json.dumps({**index, "version": 99}))
    shard = folder / "cut" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
