"""train/evaluate.py on any run and data: the losses of training's validation, and prompts for a judge."""

import json
from pathlib import Path

import numpy as np
import pytest
from launching import picture, small_config, text, train, write_packs

from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.training.run_folder import read_data_description
from transfusion_fast.training.splits import open_splits

VALIDATED = ("train.validate_every=2", "train.validate_packs=7", "train.steps=2", "data.workers=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of two sizes, in pairs and stories, with clean context, beside its data."""
    folder = tmp_path_factory.mktemp("evaluate")
    words = [TextSegment(ByteTokenizer().encode(word)) for word in ("one", "two")]
    for split, first in (("train", 0), ("heldout", 100)):
        wide = [ImageSegment(np.tile(picture(seed).values, (1, 2, 1))) for seed in range(first, first + 12)]
        pairs = [(words[seed % 2], wide[seed] if seed % 2 else picture(first + seed)) for seed in range(12)]
        stories = [(text(9, seed), image, text(9, 50 + seed)) for seed, image in enumerate(wide)]
        write_packs(folder / split, [*pairs, *stories, *[(text(20, seed),) for seed in range(9)]], 128)
    layout = ("data={context: clean, copies: 2}", f"data.path={folder / 'train'}", f"data.heldout={folder / 'heldout'}")
    train(1, folder / "train", folder / "run", *layout, *VALIDATED)
    return folder / "run"


def losses(validation: dict) -> dict:
    return {name: loss for name, loss in validation.items() if "loss" in name}


def last_validation(run: Path) -> dict:
    return losses(json.loads((run / "validation.jsonl").read_text().splitlines()[-1]))


def test_losses_are_those_of_the_validation_of_training_for_the_run_and_its_export(run, tmp_path, command) -> None:
    options = ("--each", 1, "--steps", 1)
    code, out, err = command("evaluate", run, *options)
    report = json.loads((run / "evaluation.json").read_text())
    assert (code, err) == (0, "") and losses(report["validation"]) == last_validation(run)
    assert (report["num_captioned"], report["num_others"], report["num_texts"]) == (12, 12, 9)
    assert report["num_generated"] == 2 and report["generated_accuracy"] is None
    assert "classified as prompted: not measured, since a classifier needs images of one size" in out
    assert (
        f"losses of {report['validation']['packs']} held-out packs: text {report['validation']['text_loss']:.4f}" in out
    )

    assert command("export", run, tmp_path / "model")[0] == 0
    given = ("--data", run.parent, "--out", tmp_path / "samples.png")
    assert command("evaluate", tmp_path / "model", *options, *given)[0] == 0
    exported = json.loads((tmp_path / "samples.json").read_text())
    assert exported["caption_accuracy"] == report["caption_accuracy"]
    packs = exported["validation"]["packs"]  # an export does not keep how many a run validates
    assert packs >= 7 and (packs > 7 or losses(exported["validation"]) == last_validation(run))
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    del settings["data"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    code, out, _ = command("evaluate", tmp_path / "model", *options, *given)
    assert code == 0 and "not measured, since the export has no layout" in out
    assert json.loads((tmp_path / "samples.json").read_text())["validation"] is None


def test_a_run_on_several_folders_is_measured_on_the_held_out_folder_that_it_names(run) -> None:
    train, heldout = (run.parent / split for split in ("train", "heldout"))
    config = small_config(f"{{{train}: 1, {heldout}: 1}}", f"data.heldout={heldout}")
    training, measured = open_splits(run, config, read_data_description(run), None)
    assert training is None and str(measured.folder) == str(heldout) and measured.numbers
    with pytest.raises(InputError, match=r"was trained on .*, and evaluation needs a folder .*; give --data"):
        open_splits(run, small_config(f"{{{train}: 1, {heldout}: 1}}"), read_data_description(run), None)


def test_a_run_on_text_has_losses_and_perplexity_of_the_share_that_it_holds_out(tmp_path, command) -> None:
    documents = [(TextSegment(ByteTokenizer().encode(f"{seed:2} " + "and so on " * 5)),) for seed in range(40)]
    prepare(documents, tmp_path / "text", sequence_length=128, tokenizer=ByteTokenizer(), modalities=())
    run = tmp_path / "run"
    train(1, tmp_path / "text", run, *VALIDATED, "model.dim_latent=[]", "data.heldout=0.25")
    code, out, _ = command("evaluate", run)
    report = json.loads((run / "evaluation.json").read_text())
    validation = report["validation"]
    assert code == 0 and validation["packs"] == 5 and validation["diffusion_loss"] is None
    assert validation["text_loss"] == last_validation(run)["text_loss"]
    assert report["num_texts"] == 10 and report["text_perplexity"] == pytest.approx(np.exp(validation["text_loss"]))
    assert report["not_measured"]["caption_accuracy"] == "no held-out document is one image and its caption"
    assert out.count("not measured") >= 4 and not (run / "samples.png").exists()


def test_a_judge_gets_each_entry_with_its_images_and_its_numbers_are_averaged_by_tag(
    run, tmp_path, monkeypatch, command
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = [{"prompt": "one", "tag": "dark", "most": 9}, {"prompt": "two", "category": "dark", "most": 300}]
    entries += [{"prompt": "one", "tag": "plain", "most": 300}, {"prompt": "two", "most": 300}]
    Path("some.jsonl").write_text("\n".join(map(json.dumps, entries)))
    [size] = json.loads((run / "data.json").read_text())["image_sizes"]
    Path("judge_of_light.py").write_text(
        "def judge(entry, images):\n"
        f"    assert images.shape == {(2, *size, 1)} and images.dtype == 'uint8'\n"
        "    found = {'correct': bool(images.mean() < entry['most']), 'words': len(entry['prompt'].split())}\n"
        "    return found | ({'plain': 5.0} if entry.get('tag') == 'plain' else {})\n"
        "def wrong(entry, images):\n    return {'mean': float('nan')}\n"
    )
    options = ("--prompts", "some.jsonl", "--each", 2, "--steps", 1)
    code, out, _ = command("evaluate", run, *options, "--judge", "judge_of_light:judge")
    assert code == 0 and "dark: correct 0.5000, words 1.0000" in out
    assert json.loads((run / "judged-some.json").read_text()) == {
        "prompts": 4,
        "each": 2,
        "overall": {"correct": 0.75, "words": 1.0, "plain": 5.0},
        "by_tag": {"dark": {"correct": 0.5, "words": 1.0}, "plain": {"correct": 1.0, "words": 1.0, "plain": 5.0}},
    }
    assert (run / "judged-some.png").is_file()
    code, _, err = command("evaluate", run, *options, "--judge", "judge_of_light:wrong")
    assert code == 2 and err.count("\n") == 1 and "must return a dict of finite numbers or bools by name, got" in err
