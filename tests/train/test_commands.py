"""The command lines: what they print and write, and the one line that bad input gets."""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_files import png_with_header
from launching import free_port, train
from PIL import Image

from transfusion_fast.config_reading import load_config
from transfusion_fast.data.images import latents_to_pixels, pixels_to_latents
from transfusion_fast.data.loader import open_data
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.digits import Digits
from transfusion_fast.sampling import decoder, evaluation, overview
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.generators import image_generator
from transfusion_fast.sampling.pictures import draw_grid
from transfusion_fast.sampling.settings import ImageSettings, TextSettings
from transfusion_fast.training.checkpoint_files import find_checkpoint
from transfusion_fast.training.run_folder import load_model, read_data_description


class SomeDigits(Digits):
    """Every fifth document of the digits."""

    def documents(self, split, tokenizer):
        return super().documents(split, tokenizer)[::5]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint at each, in a folder with the digits it was trained on."""
    folder = tmp_path_factory.mktemp("commands")
    prepare_splits(SomeDigits(), folder / "digits", sequence_length=128, packs_per_shard=16)
    train(1, folder / "digits" / "train", folder / "run", "train.steps=3", "train.checkpoint_every=1")
    return folder / "run"


def test_sample_draws_the_images_of_the_python_interface_where_it_was_asked_to(run: Path, tmp_path, command) -> None:
    expected, pictures = tmp_path / "expected.png", [tmp_path / "new" / name for name in ("grid", "other")]
    for picture, seed in zip(pictures, (3, 4), strict=True):
        options = ("--each", 2, "--steps", 2, "--seed", seed, "--out", picture)
        code, out, _ = command("sample", run, "--prompt", "one", "two", *options)
        assert code == 0 and f"drew 4 images of 8 x 8: {picture}" in out
    data, model = read_data_description(run), load_model(find_checkpoint(run))
    prompts = [[torch.from_numpy(data.tokenizer.encode(word)).long()] for word in ("one", "two")]
    settings = ImageSettings(steps=2, guidance=3.0, eta=1.0)
    latents = generate_images(model, prompts, images_per_prompt=2, image=settings, seed=3)
    pixels = latents_to_pixels(latents.numpy(), patch_size=2)
    draw_grid([("one", [pixels[:2]]), ("two", [pixels[2:]])], expected)
    assert pictures[0].read_bytes() == expected.read_bytes() != pictures[1].read_bytes()


def test_sample_draws_with_the_eta_guidance_and_weights_asked_for(run: Path, tmp_path: Path, command) -> None:
    pictures = {name: tmp_path / name for name in ("expected.png", "grid.png")}
    options = ("--each", 1, "--steps", 2, "--eta", 0.5, "--guidance", 9, "--raw", "--out", pictures["grid.png"])
    assert command("sample", run, "--prompt", "one", *options)[0] == 0
    model, prompt = load_model(find_checkpoint(run), raw=True), [torch.tensor([*b"one"])]
    settings = ImageSettings(steps=2, guidance=9.0, eta=0.5)
    latents = generate_images(model, [prompt], (4, 4), image=settings)
    draw_grid([("one", [latents_to_pixels(latents.numpy(), patch_size=2)])], pictures["expected.png"])
    assert pictures["grid.png"].read_bytes() == pictures["expected.png"].read_bytes()


def test_sample_changes_an_image_and_keeps_the_part_that_is_not_inpainted(run: Path, tmp_path: Path, command) -> None:
    shown, mask = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4, np.zeros((8, 8), np.uint8)
    mask[3:, :] = 255  # not at the edge of a patch
    for name, pixels in (("shown.png", shown), ("mask.png", mask)):
        Image.fromarray(pixels).save(tmp_path / name)
    drawn, draw = [], generate_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "generate_images", lambda *a, **o: (drawn.append(draw(*a, **o)), (a, o), drawn[-1])[2])
        options = ("--each", 2, "--steps", 2, "--sampler", "dpm++", "--out", tmp_path / "grid.png")
        given = ("--start", tmp_path / "shown.png", "--inpaint", tmp_path / "mask.png", "--strength", 0.7)
        code, out, _ = command("sample", run, "--prompt", "one", "two", *options, *given)
    assert code == 0 and "drew 4 images of 8 x 8" in out
    pixels = latents_to_pixels(drawn[0].numpy(), patch_size=2)
    assert pixels.shape == (4, 8, 8, 1)
    assert (pixels[:, :3, :, 0] == shown[:3]).all()
    assert (pixels[:, 3:, :, 0] != shown[3:]).mean() > 0.5


def test_an_image_to_edit_stands_before_the_prompt(run: Path, tmp_path: Path, command) -> None:
    shown = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(shown).save(tmp_path / "shown.png")
    options = ("--each", 1, "--steps", 2, "--image-guidance", 2, "--negative", "two")
    code, _, err = command("sample", run, "--prompt", "one", "--edit", tmp_path / "shown.png", *options)
    assert code == 2 and "image_guidance must be None with a negative document" in err
    pictures = [tmp_path / name for name in ("grid.png", "expected.png")]
    options = ("--each", 1, "--steps", 2, "--image-guidance", 2, "--out", pictures[0])
    assert command("sample", run, "--prompt", "one", "--edit", tmp_path / "shown.png", *options)[0] == 0
    prompt = [pixels_to_latents(shown[None, ..., None], 2)[0], torch.tensor([*b"one"])]
    settings = ImageSettings(steps=2, image_guidance=2.0)
    latents = generate_images(load_model(find_checkpoint(run)), [prompt], (4, 4), image=settings)
    draw_grid([("one", [latents_to_pixels(latents.numpy(), patch_size=2)])], pictures[1])
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_options_of_images_are_the_settings_of_the_python_interface() -> None:
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "train" / "sample.py"))

    def settings(options: str) -> ImageSettings:
        return script["_image_settings"](script["_parser"]().parse_args(["RUN", "--prompt", "one", *options.split()]))

    options = "--steps 9 --sampler ddpm --eta 0.5 --guidance 2 --guidance-interval 100 900"
    expected = ImageSettings(9, 2.0, 0.5, "auto", (100.0, 900.0), 0.25, 4.0, "ddpm", 0.75)
    given = f"{options} --guidance-rescale 0.25 --strength 0.75 --image-guidance 4"
    assert settings(f"{given} --edit image.png") == expected
    with pytest.raises(InputError, match="--image-guidance must come with --edit, got none; give the image"):
        settings(given)


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
    options = ("--each", 1, "--steps", 1, "--out", tmp_path / "grid.png", "--size", 4, 12)
    code, out, _ = command("sample", run, "--prompt", "one", *options)
    assert code == 0 and "drew 1 images of 4 x 12" in out


def test_texts_are_continued_at_the_temperature_asked_for(run: Path, command) -> None:
    options = ("--temperature", 2, "--seed", 3, "--max-tokens", 9, "--max-images", 0)
    code, out, _ = command("sample", run, "--text", "one", *options)
    model, settings = load_model(find_checkpoint(run)), TextSettings(max_tokens=9, temperature=2.0)
    [pieces] = sample(model, [[torch.tensor([*b"one"])]], max_images=0, text=settings, seed=3)
    assert (code, out) == (0, f"one{''.join(ByteTokenizer().decode(piece) for piece in pieces)}\n")


def text_settings(*options: str) -> TextSettings:
    """Return the settings that sample.py makes of its options, for a tokenizer of bytes."""
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "train" / "sample.py"))
    parsed = script["_parser"]().parse_args(["RUN", "--text", "one", *options])
    return script["_text_settings"](parsed, SimpleNamespace(tokenizer=ByteTokenizer()))


def test_options_of_text_are_the_settings_of_the_python_interface() -> None:
    options = "--max-tokens 9 --temperature 2 --top-k 3 --top-p 0.5 --min-p 0.25 --repetition-penalty 1.5"
    assert text_settings(*options.split()) == TextSettings(9, 2.0, 3, 0.5, 0.25, 1.5)
    assert text_settings() == TextSettings()


@pytest.mark.parametrize(
    ("stop", "text", "stopped"), [(["ß"], "straß", True), (["zz", "ra"], "stra", True), (["ra"], "st r a", False)]
)
def test_a_text_stops_where_one_of_the_given_ones_has_just_appeared(stop, text, stopped) -> None:
    settings = text_settings("--stop", *stop)
    assert settings.stop is not None and settings.stop([*text.encode()]) == stopped


def test_evaluate_measures_the_checkpoint_asked_for_with_the_settings_given(run: Path, command, monkeypatch) -> None:
    measured, evaluate = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **o: (measured.append((*a, o)), evaluate(*a, **o))[1])
    options = ("--each", 1, "--steps", 2, "--eta", 1.5, "--guidance", 9, "--sampler", "ddpm")
    options += ("--checkpoint", "step-00000001")
    assert command("evaluate", run, *options)[0] == 0
    [(subject, *_, settings)] = measured
    assert settings["image"] == ImageSettings(steps=2, guidance=9.0, eta=1.5, sampler="ddpm")
    assert torch.equal(subject.model.head.weight, load_model(find_checkpoint(run, "step-00000001")).head.weight)


def test_evaluate_prints_the_figures_that_it_writes(run: Path, command) -> None:
    assert (
        "not measured, since it needs 64 images of each kind, got 10 drawn, 60 held out"
        in command("evaluate", run, "--each", 1, "--steps", 1)[1]
    )
    code, out, _ = command("evaluate", run, "--each", 1, "--steps", 2)
    report = json.loads((run / "evaluation.json").read_text())
    assert code == 0 and (run / "samples.png").is_file()
    assert report["num_generated"] == 10 and report["num_captioned"] == 60
    for number in ("generated_accuracy", "caption_accuracy", "text_perplexity", "classifier_accuracy"):
        assert f"{report[number]:.3f}" in out


def test_plot_draws_a_column_for_the_noise_and_each_checkpoint(run: Path, tmp_path: Path, command, monkeypatch) -> None:
    drawn = []
    draw = overview.draw_overview
    monkeypatch.setattr(overview, "draw_overview", lambda *arguments: (drawn.append(arguments), draw(*arguments)))
    picture, rows = tmp_path / "new" / "run.png", (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(f'{rows}{{"step": 4, "lo')  # as a run leaves it that was killed
    options = ("--steps", 2, "--eta", 1.5, "--prompt", "one", "two", "--pack", 3, "--seed", 5, "--out", picture)
    code, out, _ = command("plot", run, "--overview", *options)
    assert (code, out) == (0, f"picture: {picture}\n")
    [(_, samples, keyed, *_)] = drawn
    config = load_config(run / "config.yaml")
    assert (keyed.epoch, keyed.number) == open_data(config).order(3, config.data.shuffle_window)[3]
    assert samples.steps == [0, 1, 2, 3] and samples.prompts == ["one", "two"]
    assert samples.images.shape == (4, 2, 8, 8, 1)
    noise = torch.stack([torch.randn(4, 4, 4, generator=image_generator(5, number)) for number in range(2)])
    assert np.array_equal(samples.images[0], latents_to_pixels(noise.numpy(), 2))
    model, prompts = load_model(find_checkpoint(run)), [[torch.tensor([*word.encode()])] for word in ("one", "two")]
    last = generate_images(model, prompts, image=ImageSettings(2, eta=1.5), seed=5)
    assert np.array_equal(samples.images[3], latents_to_pixels(last.numpy(), 2))
    logged = [json.loads(line) for line in rows.splitlines()]
    assert samples.losses == [(row["step"], row["loss"]) for row in logged]
    assert len(np.unique(samples.images.reshape(4, -1), axis=0)) == 4  # noise, and three different models
    with Image.open(picture) as image:
        assert image.width == 1800 and len(image.convert("RGB").getcolors(1 << 20)) > 100


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("sample nowhere --prompt one", "nowhere: is not a run folder"),
        ("sample RUN --prompt one --steps 0", "diffusion steps must be an integer in 1..1000, got 0"),
        ("plot RUN --overview --steps 1000000000", "diffusion steps must be an integer in 1..1000, got 1000000000"),
        ("sample RUN --prompt one --checkpoint ../x", "has no checkpoint '../x'"),
        ("sample RUN --caption config.yaml", "(not an image: must be JPEG, PNG, WEBP, AVIF, GIF, BMP, TIFF)"),
        ("sample RUN --caption bomb.png", "bomb.png"),  # an image of 60,000 x 60,000 pixels, by its header
        ("sample RUN --caption huge.png", "huge.png must have at most 67108864 bytes, got more"),
        ("sample RUN --prompt one --size 4 13", "--size must be multiples of 2 up to 8192, got 4 13"),
        ("sample RUN --prompt one --guidance nan", "guidance must be finite, got nan"),
        ("sample RUN --text one --start config.yaml", "--start must come with --prompt, got none"),
        ("sample RUN --prompt one --inpaint config.yaml", "--inpaint must come with --start, got none"),
        ("sample RUN --prompt one --start config.yaml", "config.yaml must be a readable image"),
        ("sample RUN --prompt one --edit nowhere.png", "nowhere.png"),
        ("sample RUN --prompt one --strength 0", "strength must be in (0, 1], got 0.0"),
        ("sample RUN --prompt one --eta -1", "eta must be at least 0 and finite, got -1.0"),
        ("sample RUN --text one --temperature nan", "temperature must be in 0..inf, got nan"),
        ("sample RUN --text one --stop=", "--stop must be texts of at least one character"),
        ("sample RUN --prompt one --temperature -1", "temperature must be in 0..inf, got -1.0"),
        ("sample config.yaml --prompt one", "config.yaml: is not a run folder"),
        ("sample RUN --prompt one --seed -1", "--seed must be in 0..9223372036854775807, got -1"),
        (
            "plot RUN --overview --seed 9223372036854775808",
            "--seed must be in 0..9223372036854775807, got 9223372036854775808",
        ),
        ("sample garbled --prompt one", "garbled: has no checkpoint"),
        ("prepare preview DATA --out DATA/index.json", "must be a file NAME.html, got"),
        ("pretrain train.seed=9223372036854775808", "train.seed: Input should be less than or equal to"),
        ("sample RUN --prompt one --vae x", "--vae needs a run on latents, got"),
        ("sample RUN --prompt one --out .", "got the folder ."),
        ("sample RUN --prompt one --out config.yaml/x.png", "cannot be made"),
        ("sample RUN --prompt one --out x.html", "must be a file NAME.png"),
        ("sample damaged --prompt one --out x.png", "is damaged (rank-00000.safetensors: not as manifest.json says)"),
        ("evaluate nowhere", "nowhere: is not a run folder"),
        ("evaluate RUN --data nowhere", "evaluation needs a folder with train/ and heldout/"),
        ("evaluate RUN --data other", "modalities of other must be that of the run"),
        ("evaluate RUN --prompts p.jsonl", "--prompts and --judge must be given together"),
        ("evaluate RUN --prompts prompts.jsonl --judge builtins:len", "line 2 of prompts.jsonl must be a JSON object"),
        (
            "evaluate RUN --prompts good.jsonl --judge nowhere:judge",
            "--judge must be MODULE:FUNCTION, got nowhere:judge",
        ),
        ("evaluate RUN --prompts good.jsonl --judge math:pi", "--judge must be a function, got math:pi, float"),
        ("evaluate RUN --clip mine", "CLIP model mine must be readable"),
        ("evaluate RUN --each 0", "--each must be at least 1, got 0"),
        ("plot . --overview", "is not a run folder"),
        ("plot RUN nowhere --out x.png", "nowhere: is not a run folder with logged steps (no rows in metrics.jsonl)"),
        ("plot RUN text --overview", "--overview must be given one run, got 2"),
        ("plot RUN --pack 3", "--pack must come with --overview"),
        ("plot text --overview", "--overview needs a run on pixels"),
        ("plot RUN --overview --pack -1", "--pack must be in 0..9223372036854775807, got -1"),
        ("plot RUN --out picture.jpg", "output must be a file NAME.png, got picture.jpg"),
        ("pretrain nowhere.yaml", "config nowhere.yaml: cannot be read"),
        ("pretrain optimizer.lr=-1", "optimizer.lr: Input should be greater than 0, got -1"),
        ("pretrain data.path=nowhere", "nowhere"),
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
    monkeypatch.setenv("MASTER_PORT", free_port())
    data = run.parent / "digits" / "train"
    _write_bad_input(tmp_path, run, data)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    name, *words = arguments.replace("RUN", str(run)).replace("DATA", str(data)).split()
    code, _, err = command(name, *words)
    assert code == (3 if "cut" in arguments else 2) and complaint in err and err.startswith(f"{name}: ")
    assert err.count("\n") == 1 and "Traceback" not in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def _write_bad_input(folder: Path, run: Path, data: Path) -> None:
    """Write a config, a folder that is not a run, bad runs, a run on text, an image bomb, and bad data folders."""
    (folder / "config.yaml").write_text("train: {steps: 3}")
    (folder / "mine").mkdir()
    (folder / "mine" / "data.json").write_text("my own")
    for name in ("damaged", "garbled", "text"):
        shutil.copytree(run, folder / name)
    (folder / "garbled" / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    description = json.loads((run / "data.json").read_text())
    without_images = {"modalities": [], "image_sizes": [], "bounds": []}
    (folder / "text" / "data.json").write_text(json.dumps(description | without_images))
    weights = folder / "damaged" / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))
    (folder / "bomb.png").write_bytes(png_with_header(60000, 60000))
    with (folder / "huge.png").open("wb") as file:
        file.truncate((64 << 20) + 1)
    for name in ("future", "cut"):
        shutil.copytree(data, folder / name)
    index = json.loads((data / "index.json").read_text())
    (folder / "future" / "index.json").write_text(json.dumps({**index, "version": 99}))
    (folder / "other").mkdir()
    larger = [{**modality, "patch_size": 4} for modality in index["modalities"]]
    (folder / "other" / "index.json").write_text(json.dumps({**index, "modalities": larger}))
    shard = folder / "cut" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
    (folder / "prompts.jsonl").write_text('{"prompt": "one"}\n["two"]\n')
    (folder / "good.jsonl").write_text('{"prompt": "one"}\n')
