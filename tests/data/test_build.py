"""Data folders from sources: the same bytes for any number of processes, whenever the run was cut off."""

import hashlib
import io
import json
import os
import resource
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from image_files import picture, png_with_header, saved
from PIL import Image

from transfusion_fast.data import build as building
from transfusion_fast.data.build import Recipe, build
from transfusion_fast.data.encode import Encoder, ImageRule
from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.sources.pairs import PairsSource
from transfusion_fast.data.sources.text import TextSource
from transfusion_fast.data.tokenizer import ByteTokenizer, train_bpe
from transfusion_fast.errors import InputError

TOKENIZER = ByteTokenizer()
RGB = ModalityInfo("images", channels=3, patch_size=4, encoding="pixels")
IMAGES = Encoder(TOKENIZER, 64, RGB, ImageRule("native", 16, 4))
PER_SHARD = 5


def jpeg(seed):
    generator = np.random.default_rng(seed)
    file = io.BytesIO()
    pixels = generator.integers(0, 256, (*generator.integers(8, 30, 2), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for number in range(3):
        with wds.TarWriter(str(folder / f"{number:05d}.tar")) as writer:
            for i in range(20):
                image = jpeg(100 * number + i)
                broken = image[:80] if i == 7 else image
                writer.write({"__key__": f"{number:05d}{i:04d}", "jpg": broken, "txt": f"picture {number} {i}"})
    return folder


@pytest.fixture
def recipe(tars):
    return Recipe(PairsSource.of([tars]), IMAGES, packs_per_shard=PER_SHARD)


def content(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def documents_in(folder):
    reader = PackReader(folder)
    return [d for number in range(len(reader)) for d in reader.read(number).documents(reader.index.modalities)]


def test_every_good_pair_is_in_the_folder_and_every_bad_one_is_counted(tmp_path, recipe):
    built = build(recipe, tmp_path / "out")
    captions = Counter(TOKENIZER.decode(text.ids) for text, _ in documents_in(tmp_path / "out"))
    assert captions == Counter(f"picture {n} {i}" for n in range(3) for i in range(20) if i != 7)
    assert all(isinstance(image, ImageSegment) for _, image in documents_in(tmp_path / "out"))
    assert built.rejected == {"image damaged": 3}
    left_out = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in left_out] == ["image damaged"] * 3
    for number, entry in enumerate(left_out):
        assert f"{number:05d}0007 in " in entry["detail"] and f"{number:05d}.tar" in entry["detail"]
    assert "000000007 in " in built.examples["image damaged"] and "00000.tar" in built.examples["image damaged"]
    assert built.index == read_index(tmp_path / "out") and built.index.documents == 57
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_preparing_goes_on_past_images_of_every_kind_and_reports_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = Image.fromarray(picture(16, 16))
    good = {
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "sixteen bits": saved(Image.fromarray(picture(16, 16)[..., 0].astype(np.uint16) * 257), "PNG"),
        "palette": saved(rgb.convert("P"), "PNG"),
        "turned": saved(rgb, "JPEG", exif=exif),
        "thin": saved(Image.new("RGB", (20_000, 1)), "PNG"),
        "plain": saved(rgb, "WEBP"),
    }
    bad = {
        "bomb": (saved(Image.new("L", (9000, 9000)), "PNG"), "image too large"),
        "header": (png_with_header(100_000, 100_000), "image too large"),
        "truncated": (saved(rgb, "JPEG")[:200], "image damaged"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        "script": (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
    }
    files = good | {name: data for name, (data, _) in bad.items()}
    with wds.TarWriter(str(tmp_path / "zoo.tar")) as writer:
        for number, (name, data) in enumerate(files.items()):
            writer.write({"__key__": f"{number:03d}", "png": data, "txt": name})
    encoder = replace(IMAGES, image=ImageRule("crop", 16, 4))
    built = build(Recipe(PairsSource.of([tmp_path / "zoo.tar"]), encoder), tmp_path / "out")
    assert built.rejected == Counter(reason for _, reason in bad.values())
    found = {TOKENIZER.decode(text.ids): image.values for text, image in documents_in(tmp_path / "out")}
    assert found.keys() == good.keys()
    grey_is_kept = np.array_equal(found["sixteen bits"][..., 0], picture(16, 16)[..., 0])
    level = np.abs(found["turned"].astype(int) - np.rot90(np.asarray(Image.open(io.BytesIO(good["turned"]))), -1))
    assert level.max() == 0 and np.ptp(found["cmyk"]) > 100 and grey_is_kept


def test_the_number_of_processes_changes_no_byte(tmp_path, recipe):
    for processes in (1, 3):
        build(recipe, tmp_path / str(processes), processes)
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_plain_webdataset_reads_the_shards(tmp_path, recipe):
    built = build(recipe, tmp_path / "out")
    files = [str(tmp_path / "out" / shard.file) for shard in built.index.shards]
    samples = list(wds.WebDataset(files, shardshuffle=False, empty_check=False))
    assert len(samples) == built.index.num_packs
    assert all({"tokens.npy", "segments.npy", "latents.npy"} <= sample.keys() for sample in samples)


class Stop(BaseException):
    """A kill."""


@pytest.mark.parametrize("after", [0, 1, 3, 4, 6])
def test_a_run_that_was_cut_off_goes_on_and_gives_the_same_bytes(tmp_path, recipe, monkeypatch, after):
    build(recipe, tmp_path / "whole")
    done = {"units": 0, "shards": 0, "left": after}

    def counted(kind, function):
        def call(*arguments):
            if done["left"] == 0:
                raise Stop
            done["left"] -= 1
            done[kind] += 1
            return function(*arguments)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(building, "write_unit", counted("units", building.write_unit))
        patched.setattr(building, "write_shard", counted("shards", building.write_shard))
        with pytest.raises(Stop):
            build(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        before = done["units"], done["shards"]
        done["left"] = 1000
        build(recipe, tmp_path / "out")
    assert sum(before) == after
    assert done["units"] == 3 and done["shards"] == len(list((tmp_path / "whole").glob("*.tar")))  # none of them twice
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_settings_do_not_go_on_with_what_was_begun(tmp_path, recipe, monkeypatch, tars):
    cut_off(recipe, tmp_path / "out", monkeypatch)
    begun = content(tmp_path / "out.partial" / "units")
    other = Recipe(recipe.source, Encoder(TOKENIZER, 128, RGB, IMAGES.image), packs_per_shard=PER_SHARD)
    with pytest.raises(InputError, match=r"out.partial was begun with other encoder; go on with those, or remove it"):
        build(other, tmp_path / "out")
    with pytest.raises(InputError, match="was begun with other source and files"):
        build(Recipe(PairsSource.of([tars / "00000.tar"]), IMAGES, packs_per_shard=PER_SHARD), tmp_path / "out")
    assert content(tmp_path / "out.partial" / "units") == begun


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"image": ImageRule("native", 12, 4)}, "encoder"),
        ({"image": ImageRule("crop", 16, 4)}, "encoder"),
        ({"long": "reject"}, "encoder"),
        ({"modality": replace(RGB, name="others")}, "encoder"),
    ],
)
def test_no_setting_of_the_encoder_may_change_meanwhile(tmp_path, recipe, monkeypatch, changes, what):
    cut_off(recipe, tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=f"was begun with other {what};"):
        build(replace(recipe, encoder=replace(IMAGES, **changes)), tmp_path / "out")


def cut_off(recipe, out, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_shard", lambda *arguments: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build(recipe, out)


def texts(path, name, count=50):
    path.write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)))
    return Recipe(TextSource.of([path]), Encoder(TOKENIZER, 64), packs_per_shard=PER_SHARD)


def words(folder):
    reader = PackReader(folder)
    documents = [d for number in range(len(reader)) for d in reader.read(number).documents(())]
    return sorted(TOKENIZER.decode(d[0].ids) for d in documents)


def test_a_file_that_changed_meanwhile_is_noticed(tmp_path, monkeypatch):
    cut_off(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match="was begun with other files"):
        build(texts(tmp_path / "a.jsonl", "new"), tmp_path / "out")


def test_settings_that_fail_before_any_document_was_read_may_be_corrected(tmp_path, recipe, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_unit", lambda *arguments: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build(recipe, tmp_path / "out")
    build(texts(tmp_path / "a.jsonl", "other"), tmp_path / "out")
    assert words(tmp_path / "out") == sorted(f"other {n}" for n in range(50))


@pytest.mark.parametrize("killed_in", ["unlink", "rmtree"])
def test_what_a_run_killed_while_tidying_up_leaves_is_never_taken_for_more(tmp_path, monkeypatch, killed_in):
    def stop(*_, **__):
        raise Stop

    recipe = texts(tmp_path / "a.jsonl", "old")
    with monkeypatch.context() as patched:
        if killed_in == "unlink":
            patched.setattr(Path, "unlink", stop)
        else:
            whole = building.shutil.rmtree
            patched.setattr(
                building.shutil, "rmtree", lambda p, *a, **k: stop() if p.name == "out.partial" else whole(p, *a, **k)
            )
        with pytest.raises(Stop):
            build(recipe, tmp_path / "out")
    assert words(tmp_path / "out") == sorted(f"old {n}" for n in range(50))
    assert (tmp_path / "out.partial").exists()
    (tmp_path / "out").rename(tmp_path / "moved")
    build(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "moved")
    assert not (tmp_path / "out.partial").exists()


def test_what_is_left_of_another_source_without_its_recipe_is_not_used(tmp_path, monkeypatch):
    cut_off(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out", monkeypatch)
    (tmp_path / "out.partial" / "recipe.json").unlink()
    build(texts(tmp_path / "b.jsonl", "new", 20), tmp_path / "out")
    assert words(tmp_path / "out") == sorted(f"new {n}" for n in range(20))


def test_thousands_of_small_files_need_few_open_ones(tmp_path):
    for kind, count in (("txt", 600), ("jsonl", 300)):
        folder = tmp_path / kind
        folder.mkdir()
        for n in range(count):
            (folder / f"{n:04d}.{kind}").write_text(
                f"{kind} {n}" if kind == "txt" else json.dumps({"text": f"{kind} {n}"})
            )
        source = TextSource.of([folder])
        assert len(source.units()) == (3 if kind == "txt" else count)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (300 + len(os.listdir("/proc/self/fd")), hard))
        try:
            build(Recipe(source, Encoder(TOKENIZER, 8192)), tmp_path / f"out-{kind}")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert words(tmp_path / f"out-{kind}") == sorted(f"{kind} {n}" for n in range(count))


def test_settings_that_leave_nothing_may_be_corrected(tmp_path, tars):
    source = PairsSource.of([tars])
    with pytest.raises(InputError, match=r"has none \(.*image too long"):
        build(Recipe(source, replace(IMAGES, sequence_length=6), packs_per_shard=PER_SHARD), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    build(Recipe(source, IMAGES, packs_per_shard=PER_SHARD), tmp_path / "out")


def test_two_runs_do_not_write_into_one_folder(tmp_path, recipe):
    with building._locked(tmp_path / "out.partial"), pytest.raises(InputError, match="another is at work in it"):
        build(recipe, tmp_path / "out")


def test_a_folder_that_is_not_free_is_left_alone(tmp_path, recipe):
    (tmp_path / "out").mkdir()
    for name in ("mine", "recipe.json"):
        (tmp_path / "out" / name).write_text("x")
        with pytest.raises(InputError, match="output folder must be new or empty"):
            build(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_finished_is_there_already_and_is_not_made_again(tmp_path, monkeypatch):
    recipe = texts(tmp_path / "a.jsonl", "old")
    built = build(recipe, tmp_path / "out")
    before = content(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_unit", lambda *arguments: pytest.fail("read again"))
        again = build(recipe, tmp_path / "out", processes=3)
    assert again.reused and again.index == built.index and content(tmp_path / "out") == before
    (tmp_path / "out" / "index.json").write_text((tmp_path / "out" / "index.json").read_text() + "\n")
    with pytest.raises(InputError, match=r"\(it was made with other index\)"):
        build(recipe, tmp_path / "out")
    with pytest.raises(InputError, match=r"\(it was made with other files and index\)"):
        build(texts(tmp_path / "a.jsonl", "newer"), tmp_path / "out")


def test_nothing_is_left_out_without_a_word_and_no_list_made_of_nothing(tmp_path):
    build(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out")
    assert not (tmp_path / "out" / "left_out.jsonl").exists()


class Deadly(ByteTokenizer):
    """Ends the process that it is sent to, as the system does where memory is short."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


def test_a_process_that_was_killed_is_one_line_and_what_was_begun_goes_on(tmp_path, recipe):
    deadly = replace(recipe, encoder=replace(IMAGES, tokenizer=Deadly()))
    with pytest.raises(InputError, match="one of 2 processes was killed, perhaps for memory; run it again with fewer"):
        build(deadly, tmp_path / "out", processes=2)
    build(recipe, tmp_path / "out")  # of the same description
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_numbers_below_one_are_refused_before_anything_is_made(tmp_path, recipe):
    with pytest.raises(InputError, match="packs_per_shard must be 1 or more, got 0"):
        Recipe(recipe.source, IMAGES, packs_per_shard=0)
    with pytest.raises(InputError, match="processes must be 1 or more, got 0"):
        build(recipe, tmp_path / "out", processes=0)
    assert not list(tmp_path.iterdir())


def test_a_source_of_nothing_but_rejects_makes_no_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n5\n')
    with pytest.raises(InputError, match=r"has none \(1 x empty text, 1 x no text\)"):
        build(Recipe(TextSource.of([tmp_path / "a.jsonl"]), Encoder(TOKENIZER, 64)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_with_a_tokenizer_of_its_own_is_split_at_pauses_and_read_back(tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * 40
    tokenizer = train_bpe([text], 280)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(9)))
    recipe = Recipe(TextSource.of([tmp_path / "a.jsonl"]), Encoder(tokenizer, 256), buffer=20)
    built = build(recipe, tmp_path / "out", processes=2)
    documents = documents_in(tmp_path / "out")
    assert all(isinstance(segment, TextSegment) for document in documents for segment in document)
    pieces = [tokenizer.decode(text.ids) for (text,) in documents]
    assert sum(map(len, pieces)) == sum(len(f"{i} {text}") for i in range(9))
    assert built.index.tokenizer == tokenizer.describe() and built.index.num_text_tokens == 280
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.content
