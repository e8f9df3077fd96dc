"""The commands that look after a data folder, and preparations that are killed or interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from image_files import png
from PIL import Image

from transfusion_fast.data.index import INDEX_NAME, read_index
from transfusion_fast.data.reader import PackReader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
import prepare

IMAGES = ("--image-size", "16", "--seq-len", "64")


@pytest.fixture
def run(capsys):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def run_command(*arguments):
        one_process = () if arguments[0] in ("info", "preview") else ("--processes", "1")
        code = prepare.main([*map(str, arguments), *one_process])
        return code, *capsys.readouterr()

    return run_command


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Interleaved documents of two texts and a picture between them."""
    folder = tmp_path_factory.mktemp("source") / "stories"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.png").write_bytes(png(np.full((20, 30, 3), 20 * number, np.uint8)))
    lines = [json.dumps({"content": [f"once {n}", {"image": f"{n}.png"}, "the end"]}) for n in range(12)]
    (folder / "stories.jsonl").write_text("\n".join([*lines, '{"content": [{"image": "none.png"}]}']))
    return folder


@pytest.fixture(scope="module")
def prepared(stories, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    options = (*IMAGES, "--patch-size", "8", "--packs-per-shard", "2", "--processes", "1")
    assert prepare.main(["interleaved", str(stories), "--out", str(out), *options]) == 0
    return out


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def test_preview_writes_a_page(prepared, tmp_path, run):
    page, other = tmp_path / "new" / "page.html", tmp_path / "seed.html"
    assert run("preview", prepared, "--pack", 1, "--out", page) == (0, f"3 documents: {page}\n", "")
    assert page.read_text().count("<img") == 6 and "the end" in page.read_text()
    assert run("preview", prepared, "--pack", 1, "--seed", 1, "--out", other)[0] == 0
    assert other.read_text().split("<section>")[1:] != page.read_text().split("<section>")[1:]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--pack", 99), "--pack must be"), (("--pack", -1), "--pack must be"), (("--epoch", -1), "--epoch must be"),
        (("--seed", -1), "--seed must be"), (("--vae", "."), "--vae needs a folder of latents"),
    ],
    ids=str,
)  # fmt: skip
def test_preview_refuses_what_it_cannot_show(prepared, tmp_path, run, option, said):
    code, out, err = run("preview", prepared, *option, "--out", tmp_path / "other.html")
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "other.html").exists()


def test_info_counts_and_draws(folder, tmp_path, run):
    named = folder.rename(tmp_path / os.fsdecode(b"\xff"))  # a name that is no text
    code, out, err = run("info", named, "--picture", tmp_path / "new" / "lengths.png")
    assert code == 0 and not err
    assert (
        "images: 12 of 48 patches" in out
        and "shapes" not in out
        and "12 documents" in out
        and "76.7 % of ids and patches" in out
    )
    assert "% at 2048" in out and "% at 16384" in out
    assert np.asarray(Image.open(tmp_path / "new" / "lengths.png").convert("L")).std() > 5
    assert run("preview", named, "--out", tmp_path / "page.html")[0] == 0


@pytest.mark.parametrize(("shape", "size"), [("crop", (16, 16)), ("buckets", (12, 20)), ("native", (12, 16))])
def test_images_are_cropped_or_keep_their_shape(stories, tmp_path, run, shape, size):
    code, _, err = run("interleaved", stories, "--out", tmp_path, *IMAGES, "--patch-size", "4", "--shape", shape)
    assert code == 0 and "left out 1: " in err and "none.png" in err
    assert {tuple(row[4:6]) for row in PackReader(tmp_path).read(0).segments.tolist() if row[1]} == {size}


def test_verify_names_every_finding_or_ends_with_0(folder, run):
    code, out, err = run("verify", folder)
    assert (code, err) == (0, "") and "as its index says" in out
    (folder / "shard-000001.tar").unlink()
    code, out, err = run("verify", folder)
    assert code == 1 and not out
    assert err.count("\n") == 2, "one line for the shard, one for the sum"
    assert "shard-000001.tar" in err and "1 findings" in err


def test_index_is_rebuilt_and_accepts_other_shards_on_request_only(folder, tmp_path, run):
    before = (folder / INDEX_NAME).read_bytes()
    assert run("index", folder)[0] == 0
    assert (folder / INDEX_NAME).read_bytes() == before
    (folder / "shard-000001.tar").unlink()
    code, _, err = run("index", folder)
    assert code == 2 and err.count("\n") == 1 and "--accept" in err
    assert run("index", folder, "--accept")[0] == 0
    assert len(read_index(folder).shards) == len(json.loads(before)["shards"]) - 1
    (tmp_path / "like").mkdir()
    (folder / "shard-000000.tar").rename(tmp_path / "like" / "shard-000000.tar")
    code, _, err = run("index", tmp_path / "like")
    assert code == 2 and "--like" in err and err.count("\n") == 1
    assert run("index", tmp_path / "like", "--like", folder)[0] == 0
    assert run("verify", tmp_path / "like")[0] == 0


@pytest.mark.parametrize("command", ["info", "verify", "index"])
def test_a_folder_without_an_index_gets_one_line_and_code_2(command, tmp_path, run):
    code, out, err = run(command, tmp_path)
    assert code == 2 and not out
    assert err.startswith("prepare: ") and err.count("\n") == 1 and INDEX_NAME in err


@pytest.mark.parametrize(
    "arguments",
    [
        "info URL", "verify URL", "index URL", "preview URL", "repack URL --out x", "digits URL", "text URL --out x",
        "text x --out x --tokenizer URL", "pairs x --out x --vae URL", "info x --picture URL",
    ],
)  # fmt: skip
def test_no_url_is_taken_for_a_file_or_folder(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main(arguments.replace("URL", "https://host/data").split())
    assert ended.value.code == 2
    assert "files and folders must be local, got 'https://host/data'" in capsys.readouterr().err


@pytest.fixture
def started(tmp_path):
    """A preparation by two processes in a session of its own: its first unit is finished, the others take seconds.

    It takes SIGINT as in a terminal, although a shell that started the tests in the background ignores it.
    """
    (tmp_path / "in").mkdir()
    for number in range(4):
        words = "some words. " * (60_000 if number else 1)
        (tmp_path / "in" / f"{number:02d}.jsonl").write_text(json.dumps({"text": words}) + "\n")
    command = [sys.executable, prepare.__file__, "text", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--seq-len", "512", "--processes", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    units = tmp_path / "out.partial" / "units"
    while process.poll() is None and not any(units.glob("*.json")):
        time.sleep(0.02)
    yield process, units
    process.kill()
    process.wait()


def test_workers_end_with_the_process_that_was_killed(started):
    process, _ = started
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    alive = psutil.wait_procs(family, timeout=20)[1]
    for worker in alive:
        worker.kill()
    assert len(family) >= 3 and not alive  # what starts workers, and two of them


def test_ctrl_c_ends_preparing_in_one_line_and_the_same_command_resumes(started):
    process, units = started
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in err
    assert "prepare: interrupted; the same command resumes" in err
    # A mark in the finished unit shows that it is used again.
    documents, _, *others = json.loads((units / "000000.json").read_text())
    (units / "000000.json").write_text(json.dumps([documents, 1234, *others]))
    again = subprocess.run([*process.args[:-1], "1"], capture_output=True, text=True)
    assert again.returncode == 0 and "split 1237 documents" in again.stderr
