"""Validation: the same packs with the same noise on any number of ranks, with the average of the weights."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import OneRank, metrics, refusal, small_config, start, state_of, text, train, write_packs
from PIL import Image, ImageSequence

from transfusion_fast.data.batch import KeyedPack
from transfusion_fast.data.loader import batch_builder, complete_config, open_data, open_heldout
from transfusion_fast.data.mixture import MixtureReader
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.sampling.decoder import generate_images
from transfusion_fast.sampling.settings import ImageSettings
from transfusion_fast.training.checkpoint_files import find_checkpoint
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.run_folder import describe_data, load_model
from transfusion_fast.training.samples import PromptSampler
from transfusion_fast.training.validation import Validation

OBSERVED = (
    "train.validate_every=2",
    "train.validate_packs=7",
    "train.sample_every=4",
    "train.sample_steps=2",
    "train.sample_prompts=[one, two]",
    "train.micro_batch=2",
    "train.steps=5",
    "train.checkpoint_every=5",
)


def rows(run: Path) -> list[dict]:
    """Return the rows of validation without their seconds, which differ."""
    found = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in found]


def expected_loss(run: Path, data: Path, *overrides: str) -> tuple[float, float, list[float]]:
    """Return the losses of the held-out packs one by one, as the last average of the weights gives them: text, images,
    and images by quarter of the timesteps."""
    config = small_config(data, *overrides, "train.seed=0")
    mixture = open_data(config)
    heldout, numbers = open_heldout(config, mixture)
    reader, builder, model = (
        MixtureReader(heldout, 4),
        batch_builder(config, mixture, 1),
        load_model(find_checkpoint(run)),
    )
    assert len(numbers) == 7
    sums, tokens, images = torch.zeros(2), 0, 0
    by_quarter: dict[int, list[float]] = {1: [], 2: [], 3: [], 4: []}
    for number in numbers:
        batch = builder([KeyedPack(reader.read(number), 0, number)])
        with torch.no_grad():
            losses = model(batch, counts=Counts(1, 1))
        sums += torch.stack([losses.text, losses.diffusion])
        tokens, images = tokens + len(batch.supervised), images + batch.num_images
        for t, loss in zip(batch.modalities[0].timesteps.tolist(), losses.per_image.tolist(), strict=True):
            by_quarter[math.ceil(t / 250)].append(loss)
    return sums[0].item() / tokens, sums[1].item() / images, [np.mean(own) for own in by_quarter.values()]


@pytest.fixture(scope="module")
def observed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks at stage 3 with validation on a folder and samples."""
    run = tmp_path_factory.mktemp("observed") / "run"
    printed = train(2, digits, run, *OBSERVED, f"data.heldout={digits.parent / 'heldout'}")
    assert f"step 4, samples: {run / 'samples' / 'step-00000004.png'}" in printed
    assert "step 4, held-out packs: text " in printed and f"samples of all steps: {run / 'samples'}" in printed
    return run


def test_validation_gives_the_loss_of_the_average_on_any_number_of_ranks_and_at_any_stage(
    digits: Path, observed: Path, tmp_path: Path
) -> None:
    heldout = f"data.heldout={digits.parent / 'heldout'}"
    assert [row["step"] for row in rows(observed)] == [2, 4, 5]
    text, diffusion, quarters = expected_loss(observed, digits, *OBSERVED, heldout)
    last = rows(observed)[-1]
    assert [last[f"diffusion_loss_q{n}"] for n in (1, 2, 3, 4)] == pytest.approx(quarters, rel=1e-5)
    assert (last["text_loss"], last["diffusion_loss"]) == pytest.approx((text, diffusion), rel=1e-5)
    assert last["loss"] == pytest.approx(text + 5 * diffusion, rel=1e-5)
    train(1, digits, tmp_path / "one", *OBSERVED, heldout, "train.zero_stage=1")
    assert rows(tmp_path / "one") == [pytest.approx(row, rel=1e-5) for row in rows(observed)]


def test_neither_validation_nor_samples_change_the_training(digits: Path, observed: Path, tmp_path: Path) -> None:
    train(2, digits, tmp_path / "run", *OBSERVED, "train.validate_every=0", "train.sample_every=0")
    assert state_of(tmp_path / "run", 5) == state_of(observed, 5)
    assert metrics(tmp_path / "run") == metrics(observed)
    assert not (tmp_path / "run" / "validation.jsonl").exists() and not (tmp_path / "run" / "samples").exists()


def test_the_packs_of_a_share_are_validated_and_never_trained_on(digits: Path, tmp_path: Path) -> None:
    share = (*OBSERVED, "data.heldout=0.25", "train.sample_every=0")
    train(1, digits, tmp_path / "run", *share)
    config = small_config(digits, *share)
    mixture = open_data(config)
    order, packs = mixture.order(3, 4), mixture.num_packs
    trained = {order[i][1] for i in range(packs)}
    assert trained == set(range(packs)) - set(range(3, packs, 4))
    assert set(open_heldout(config, mixture)[1]) <= set(range(3, packs, 4))
    text, diffusion, _ = expected_loss(tmp_path / "run", digits, *share)
    last = rows(tmp_path / "run")[-1]
    assert (last["text_loss"], last["diffusion_loss"]) == pytest.approx((text, diffusion), rel=1e-5)
    told = refusal(start(1, digits, tmp_path / "run", *share, "data.heldout=0.5", "train.steps=9"))
    assert "order" in told and "share of data.heldout" in told


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.heldout=null", "train.validate_every=2"], "train.validate_every needs data.heldout, got none"),
        (["train.sample_every=2"], "train.sample_every needs train.sample_prompts, got none"),
        (["data.heldout=0.7"], "data.heldout.share: Input should be less than or equal to 0.5, got 0.7"),
    ],
)
def test_settings_that_lack_their_other_half_are_refused(digits: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(InputError) as refused:
        small_config(digits, *overrides)
    assert told in str(refused.value)


def test_a_share_that_holds_out_nothing_is_refused(digits: Path) -> None:
    with pytest.raises(InputError, match=r"data\.heldout must hold out at least one of the .* packs of .*, got 0\.001"):
        open_data(small_config(digits, "data.heldout=0.001"))


def test_a_resumed_run_measures_and_draws_what_an_uninterrupted_one_does(
    digits: Path, observed: Path, tmp_path: Path
) -> None:
    heldout, run = f"data.heldout={digits.parent / 'heldout'}", tmp_path / "run"
    wsd = ("optimizer.schedule=constant",)
    train(2, digits, tmp_path / "whole", *OBSERVED, heldout, *wsd)
    train(2, digits, run, *OBSERVED, heldout, *wsd, "train.steps=3")
    train(2, digits, run, *OBSERVED, heldout, *wsd)
    assert [row["step"] for row in rows(run)] == [2, 3, 4, 5]
    assert [row for row in rows(run) if row["step"] != 3] == rows(tmp_path / "whole")
    for name in ("step-00000004.png", "step-00000005.png"):
        assert (run / "samples" / name).read_bytes() == (tmp_path / "whole" / "samples" / name).read_bytes()
    assert (run / "samples" / "learned.png").is_file() and state_of(run, 5) == state_of(tmp_path / "whole", 5)


def test_the_measured_packs_are_spread_over_all_that_are_held_out(digits: Path) -> None:
    config = small_config(digits, "data.heldout=0.1", "train.validate_packs=7")
    mixture = open_data(config)
    held, numbers = mixture.held_out, open_heldout(config, mixture)[1]
    assert len(held) > 20 and [held.index(n) for n in numbers] == [i * len(held) // 7 for i in range(7)]
    folder = small_config(digits, f"data.heldout={digits.parent / 'heldout'}", "train.validate_packs=7")
    heldout, numbers = open_heldout(folder, mixture)
    assert numbers == [i * heldout.num_packs // 7 for i in range(7)]


def test_held_out_data_that_do_not_fit_the_training_data_are_refused(digits: Path, tmp_path: Path) -> None:
    longer = write_packs(tmp_path / "longer", [(text(100, seed),) for seed in range(9)], 256)
    documents = [(text(100, seed),) for seed in range(9)]
    prepare(documents, tmp_path / "text", sequence_length=128, tokenizer=ByteTokenizer(), modalities=())
    for path, heldout, told in (
        (digits, longer, f"sequence_length .* 128 in {digits} and 256 in {longer}"),
        (tmp_path / "text", digits, "data.heldout must be text alone, as .*text is, got images in"),
    ):
        config = small_config(path, f"data.heldout={heldout}")
        with pytest.raises(InputError, match=told):
            open_heldout(config, open_data(config))


class Half(OneRank):
    """One of two ranks that run one after the other; `parts` has what they have gathered."""

    def __init__(self, rank: int, parts: list):
        Ranks.__init__(self, rank, 2, torch.device("cpu"), control=None)
        vars(self)["parts"] = parts  # the class is frozen

    def gather(self, items: list) -> list:
        self.parts += items
        return [*((number, items[0][1]) for number in range(9)), *self.parts]


def test_an_image_of_a_caption_is_the_same_on_any_number_of_ranks_and_the_model_trains_on(
    digits: Path, tmp_path: Path, capsys
) -> None:
    overrides = (
        "train.sample_prompts=[one, two, three]",
        "train.sample_each=3",
        "train.sample_steps=2",
        "train.sample_eta=1.5",
    )
    config = small_config(digits, *OBSERVED, *overrides, f"data.heldout={digits.parent / 'heldout'}")
    data = open_data(config)
    config, described = complete_config(config, data), describe_data(data)
    model, settings, parts = Transfusion(config.model).train(), ImageSettings(2, eta=1.5, clip=1.0), []
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    every = (OneRank(), Half(0, parts), Half(1, parts))
    drawn = [PromptSampler(config.train, described, tmp_path, ranks).draw(model) for ranks in every]
    assert model.training
    for number, caption in enumerate(name for name in ("one", "two", "three") for _ in range(3)):
        prompt = [torch.from_numpy(described.tokenizer.encode(caption)).long()]
        [alone] = generate_images(model.eval(), [prompt], described.grid(0), image=settings, prompt_numbers=[number])
        for images in (drawn[0], drawn[2]):
            torch.testing.assert_close(images[number], alone, rtol=1e-4, atol=1e-4)
    Validation(config, data, OneRank()).measure(model.train(), 1)
    assert model.training
    model.codecs[0].decoder.weight.data.fill_(float("nan"))
    black = PromptSampler(config.train, described, tmp_path, OneRank()).draw(model)
    assert (black == -1).all(), "a run goes on where its samples cannot be drawn"
    assert "black samples are written, since a drawn image must be finite, got NaN" in capsys.readouterr().err


def test_the_animation_has_the_pictures_up_to_its_step_and_not_those_that_a_run_has_yet_to_repeat(
    digits: Path, tmp_path: Path
) -> None:
    config = small_config(digits, *OBSERVED, "data.heldout=null", "train.validate_every=0")
    sampler = PromptSampler(config.train, describe_data(open_data(config)), tmp_path, OneRank())
    sampler.folder.mkdir()
    for step in (2, 4, 6):
        Image.new("RGB", (4, 3), (step, 0, 0)).save(sampler.path(step))
    animation = sampler.animate(4)
    assert animation is not None
    with Image.open(animation) as image:
        assert [frame.convert("RGB").getpixel((0, 0))[0] for frame in ImageSequence.Iterator(image)] == [2, 4]
