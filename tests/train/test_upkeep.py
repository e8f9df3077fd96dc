"""The commands that look after a data folder: what they print and the codes they end with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from transfusion_fast.data.index import INDEX_NAME, read_index
from transfusion_fast.data.reader import PackReader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
import prepare


@pytest.fixture
def folder(tmp_path, capsys):
    """Stories of two texts and a picture between them."""
    stories = tmp_path / "stories"
    stories.mkdir()
    for number in range(12):
        Image.fromarray(np.full((20, 30, 3), 20 * number, np.uint8)).save(stories / f"{number}.png")
    lines = [json.dumps({"content": [f"once {n}", {"image": f"{n}.png"}, "the end"]}) for n in range(12)]
    (stories / "stories.jsonl").write_text("\n".join([*lines, '{"content": [{"image": "none.png"}]}']))
    size = ("--image-size", "16", "--patch-size", "8", "--seq-len", "64", "--processes", "1", "--packs-per-shard", "2")
    code, out, err = run(capsys, "interleaved", stories, "--out", tmp_path / "data", *size)
    assert code == 0 and "12 documents" in out
    assert "left out 1: " in err and "none.png" in err
    return tmp_path / "data"


def run(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = prepare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_preview_writes_a_page(folder, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    assert run(capsys, "preview", folder, "--pack", 1, "--out", page) == (0, f"3 documents: {page}\n", "")
    assert page.read_text().count("<img") == 6 and "the end" in page.read_text()
    other = tmp_path / "seed.html"
    assert run(capsys, "preview", folder, "--pack", 1, "--seed", 1, "--out", other)[0] == 0
    assert other.read_text().split("<section>")[1:] != page.read_text().split("<section>")[1:]
    for option in (["--pack", 99], ["--pack", -1], ["--epoch", -1], ["--seed", -1]):
        code, out, err = run(capsys, "preview", folder, *option, "--out", tmp_path / "other.html")
        assert (code, out) == (2, "") and err.count("\n") == 1 and f"{option[0]} must be" in err
    assert not (tmp_path / "other.html").exists()


def test_info_counts_and_draws(folder, tmp_path, capsys):
    code, out, err = run(capsys, "info", folder, "--picture", tmp_path / "new" / "lengths.png")
    assert code == 0 and not err
    assert "images: 12 of 48 patches" in out and "12 documents" in out
    assert "% at 2048" in out and "% at 16384" in out
    assert np.asarray(Image.open(tmp_path / "new" / "lengths.png").convert("L")).std() > 5


def test_the_shape_of_images_is_as_asked_for(folder, tmp_path, capsys):
    stories, sizes = tmp_path / "stories", {}
    for shape in ("crop", "native"):
        out = tmp_path / shape
        options = ("--image-size", "16", "--patch-size", "4", "--shape", shape, "--processes", "1", "--seq-len", "64")
        assert run(capsys, "interleaved", stories, "--out", out, *options)[0] == 0
        rows = PackReader(out).read(0).segments
        sizes[shape] = {tuple(row[4:6]) for row in rows.tolist() if row[1]}
    assert sizes == {"crop": {(16, 16)}, "native": {(12, 16)}}


def test_documents_that_were_cut_are_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("A sentence of some words. " * 20)
    (tmp_path / "in" / "b.txt").write_text("short")
    code, _, err = run(capsys, "text", tmp_path / "in", "--out", tmp_path / "out", "--seq-len", 64, "--processes", "1")
    assert code == 0 and "split 1 documents that are longer than a pack" in err


def test_verify_says_all_or_ends_with_1(folder, capsys):
    code, out, err = run(capsys, "verify", folder)
    assert (code, err) == (0, "") and "as its index says" in out
    (folder / "shard-000001.tar").unlink()
    code, out, err = run(capsys, "verify", folder)
    assert code == 1 and not out
    assert err.count("\n") == 2, "one line for the shard, one for the sum"
    assert "shard-000001.tar" in err and "1 findings" in err


def test_index_is_made_anew_and_accepts_only_what_it_is_told_to(folder, tmp_path, capsys):
    before = (folder / INDEX_NAME).read_bytes()
    assert run(capsys, "index", folder)[0] == 0
    assert (folder / INDEX_NAME).read_bytes() == before
    (folder / "shard-000001.tar").unlink()
    code, _, err = run(capsys, "index", folder)
    assert code == 2 and err.count("\n") == 1 and "--accept" in err
    assert run(capsys, "index", folder, "--accept")[0] == 0
    assert len(read_index(folder).shards) == len(json.loads(before)["shards"]) - 1
    like = tmp_path / "like"
    like.mkdir()
    (folder / "shard-000000.tar").rename(like / "shard-000000.tar")
    assert run(capsys, "index", like, "--like", folder)[0] == 0
    assert run(capsys, "verify", like)[0] == 0


@pytest.mark.parametrize("command", ["info", "verify", "index"])
def test_a_folder_that_is_none_gets_one_line_and_code_2(command, tmp_path, capsys):
    code, out, err = run(capsys, command, tmp_path)
    assert code == 2 and not out
    assert err.startswith("prepare: ") and err.count("\n") == 1 and INDEX_NAME in err


def test_a_folder_without_an_index_asks_for_settings(folder, capsys):
    (folder / INDEX_NAME).unlink()
    code, _, err = run(capsys, "index", folder)
    assert code == 2 and "--like" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["info", "verify", "index", "preview", "repack"])
def test_commands_of_local_folders_take_no_url(command, capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main([command, "https://host/data"])
    assert (
        ended.value.code == 2 and "files and folders must be local, got 'https://host/data'" in capsys.readouterr().err
    )


def test_preview_with_an_autoencoder_needs_latents(folder, tmp_path, capsys):
    code, _, err = run(capsys, "preview", folder, "--vae", tmp_path, "--out", tmp_path / "x.html")
    assert code == 2 and "--vae needs a folder of latents" in err


def test_workers_end_with_the_process_that_was_killed(tmp_path):
    for number in range(4):
        words = "some words. " * (60_000 if number else 1)
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number:02d}.jsonl").write_text(json.dumps({"text": words}) + "\n")
    command = [sys.executable, prepare.__file__, "text", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    started = subprocess.Popen([*command, "--processes", "2"], stderr=subprocess.DEVNULL)
    units = tmp_path / "out.partial" / "units"
    while started.poll() is None and not any(units.glob("*.json")):
        time.sleep(0.02)
    family = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    alive = psutil.wait_procs(family, timeout=20)[1]
    for process in alive:
        process.kill()
    assert len(family) >= 3 and not alive  # what starts workers, and two of them


def test_ctrl_c_ends_preparing_in_one_line_and_the_same_command_goes_on(tmp_path):
    for number in range(6):  # the first is done at once, the others take seconds
        words = "some words. " * (60_000 if number else 1)
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number:02d}.jsonl").write_text(json.dumps({"text": words}) + "\n")
    command = [sys.executable, prepare.__file__, "text", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    command += ["--seq-len", "512", "--processes", "2"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    units = tmp_path / "out.partial" / "units"
    while started.poll() is None and not any(units.glob("*.json")):
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGINT)
    err = started.communicate(timeout=60)[1]
    assert started.returncode == 130 and "Traceback" not in err
    assert "prepare: interrupted; the same command resumes" in err
    # What was finished says so of itself: it is heard again only where it is used again.
    *_, cut, checksums = json.loads((units / "000000.json").read_text())
    (units / "000000.json").write_text(json.dumps([1, {"mark": 1}, {"mark": "made before"}, cut, checksums]))
    again = subprocess.run([*command[:-1], "1"], capture_output=True, text=True)
    assert again.returncode == 0 and "left out 1: made before" in again.stderr
