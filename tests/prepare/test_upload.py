"""A folder at a URL is complete or has no index, is resumed file by file, and is never written over another one."""

import json
import os
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
from build_cases import Stop, content, stop, texts
from fsspec.implementations.memory import MemoryFileSystem

from transfusion_fast.data.folder import FetchError, ShardCache, as_folder
from transfusion_fast.data.index import INDEX_NAME, parse_index
from transfusion_fast.data.reader import PackReader
from transfusion_fast.errors import InputError
from transfusion_fast.prepare import upload
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.upload import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
import prepare

URL = "memory://uploads/data"


@pytest.fixture
def memory():
    """The file system of memory:// URLs, empty."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A recipe, and its folder of several shards."""
    folder = tmp_path_factory.mktemp("prepared")
    recipe = texts(folder / "texts.jsonl", "text", 250)
    build(recipe, folder / "data")
    return recipe, folder / "data"


@pytest.fixture
def writes(monkeypatch):
    """The names of the files that are written to memory; `faults` are called with (name, bytes) before."""
    names, put = [], MemoryFileSystem.put_file

    def logged(self, local, path, **options):
        name = path.removeprefix("/uploads/data/")
        logged.fault(self, name, path)
        names.append(name)
        put(self, local, path, **options)
        logged.damage(self, name, path)

    logged.fault = logged.damage = lambda *_: None
    names_and_faults = names, logged
    monkeypatch.setattr(MemoryFileSystem, "put_file", logged)
    return names_and_faults


def files(memory, below="/uploads/data"):
    return {path.removeprefix(below + "/"): memory.cat_file(path) for path in memory.find(below)}


def local_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(action, *arguments, said=""):
    with pytest.raises(InputError) as error:
        action(*arguments)
    assert "\n" not in str(error.value) and said in str(error.value)
    return str(error.value)


def test_an_uploaded_folder_is_read_like_the_local_one(prepared, memory, tmp_path):
    recipe, folder = prepared
    assert Target(URL).finished(recipe.describe()) == {}
    assert Target(URL + "/").upload(folder) == len(local_files(folder)) >= 8
    assert files(memory) == local_files(folder)
    assert Target(URL).finished(recipe.describe()) == {URL: parse_index(folder)}
    far, near = PackReader(as_folder(URL, ShardCache(tmp_path / "cache", 10**9))), PackReader(folder)
    for number in range(len(near)):
        assert far.read(number).tokens.tolist() == near.read(number).tokens.tolist()


def test_data_folders_below_one_recipe_are_uploaded_together(prepared, memory, tmp_path):
    recipe, folder = prepared
    for side in ("train", "heldout"):
        shutil.copytree(folder, tmp_path / "both" / side)
    described = json.loads((folder / "recipe.json").read_text())
    described["index"] = dict.fromkeys(("train", "heldout"), described["index"])
    (tmp_path / "both" / "recipe.json").write_text(json.dumps(described))
    (tmp_path / "both" / "left_out.jsonl").write_text("")
    Target(URL).upload(tmp_path / "both")
    assert memory.cat_file("/uploads/data/heldout/shard-000001.tar") == (folder / "shard-000001.tar").read_bytes()
    index = parse_index(folder)
    assert Target(URL).finished(recipe.describe()) == {f"{URL}/train": index, f"{URL}/heldout": index}
    memory.rm("/uploads/data/heldout/index.json")
    assert Target(URL).finished(recipe.describe()) == {}
    assert Target(URL).upload(tmp_path / "both") == 1


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_the_recipe_is_written_first_and_the_index_last(prepared, memory, writes, monkeypatch, small):
    monkeypatch.setattr(upload, "_SMALL", small)
    Target(URL).upload(prepared[1])
    names = writes[0]
    assert (names[0], names[-1]) == ("recipe.json", INDEX_NAME) and len(names) == len(local_files(prepared[1]))


def test_an_upload_that_fails_is_one_line_leaves_no_index_and_resumes(prepared, memory, writes, tmp_path):
    recipe, folder = prepared
    names, control = writes

    def denied(_, name, __):
        if name == "shard-000002.tar":
            raise PermissionError("denied")

    control.fault = denied
    refused(
        Target(URL).upload, folder, said="must be readable and writable, got PermissionError: denied; check the URL"
    )
    done = list(names)
    assert INDEX_NAME not in files(memory) and "shard-000000.tar" in done
    assert Target(URL).finished(recipe.describe()) == {}
    with pytest.raises(FetchError):
        parse_index(as_folder(URL, ShardCache(tmp_path / "cache", 10**9)))
    control.fault = lambda *_: None
    memory.pipe_file("/uploads/data/shard-000000.tar", b"half of it")
    assert Target(URL).upload(folder) == len(local_files(folder)) - len(done) + 1
    assert sorted(names) == sorted([*local_files(folder), "shard-000000.tar"])
    assert files(memory) == local_files(folder)
    assert Target(URL).upload(folder) == 0


def test_a_temporary_fault_is_tried_again(prepared, memory, writes, monkeypatch):
    waits, faults = [], iter([OSError("busy")] * 2)
    monkeypatch.setattr("time.sleep", waits.append)

    def busy(_, name, __):
        if name == "shard-000001.tar" and (fault := next(faults, None)):
            raise fault

    writes[1].fault = busy
    Target(URL).upload(prepared[1])
    assert waits == [1, 2] and files(memory) == local_files(prepared[1])


@pytest.mark.parametrize("name", ["shard-000001.tar", "recipe.json", INDEX_NAME])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_what_arrives_damaged_is_noticed(prepared, memory, writes, tmp_path, name, damage):
    folder = prepared[1]
    table = parse_index(folder).shards[1].table

    def damaged(_, written, path):
        if written == name:
            good = memory.cat_file(path)
            at = table + 600 if name.endswith(".tar") else len(good) // 2
            flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
            memory.pipe_file(path, good[:-1] if damage == "truncated" else flipped)

    writes[1].damage = damaged
    refused(Target(URL).upload, folder, said=f"{URL}/{name} must be as {folder / name}, got other bytes; run it again")
    if name != INDEX_NAME:
        assert INDEX_NAME not in files(memory)


def test_a_target_that_holds_anything_else_is_refused_and_stays_as_it_is(prepared, memory, tmp_path):
    recipe, folder = prepared
    other = texts(tmp_path / "other.jsonl", "other", 60)
    build(other, tmp_path / "other")
    index, settings = (json.loads((folder / name).read_text()) for name in (INDEX_NAME, "recipe.json"))
    cases = {
        "no recipe.json": {"notes.txt": b"mine"},
        "no recipe.json ": {INDEX_NAME: (folder / INDEX_NAME).read_bytes()},
        "a folder of other settings: files": local_files(tmp_path / "other"),
        "a folder of other settings: packing.seed 1 -> 0": {
            "recipe.json": json.dumps({**settings, "packing": {**settings["packing"], "seed": 1}}).encode()
        },
        "also notes.txt": {"recipe.json": (folder / "recipe.json").read_bytes(), "notes.txt": b"mine"},
        f"another {INDEX_NAME}": {
            "recipe.json": (folder / "recipe.json").read_bytes(),
            INDEX_NAME: json.dumps({**index, "documents": 1}).encode(),
        },
    }
    for said, held in cases.items():
        memory.store.clear()
        for name, data in held.items():
            memory.pipe_file(f"/uploads/data/{name}", data)
        refused(
            Target(URL).upload,
            folder,
            said=f"{URL} must be empty, or hold what this command writes, got {said.strip()}",
        )
        assert files(memory) == held
        if "settings" in said or "recipe" in said:
            refused(Target(URL).finished, recipe.describe(), said=f"got {said.strip()}")


def run(out, *options):
    return prepare.main([*map(str, ("text", *options, "--out", out, "--processes", 1, "--packs-per-shard", 5))])


@pytest.fixture
def source(tmp_path):
    texts(tmp_path / "a.jsonl", "text")
    return tmp_path / "a.jsonl"


def test_the_command_uploads_removes_its_local_copy_and_then_finds_it_there(
    source, memory, tmp_path, capsys, monkeypatch
):
    work = ("--work", tmp_path / "work", "--seq-len", 64)
    assert run(tmp_path / "local", source, "--seq-len", 64) == run(URL, source, *work) == 0
    out = capsys.readouterr().out
    assert f"{URL}: complete: {len(files(memory))} files uploaded; " in out and f"{tmp_path / 'work'} is removed" in out
    assert files(memory) == local_files(tmp_path / "local")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "local"}
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "build", stop)
        assert run(URL, source, *work) == 0
    assert f"{URL}: already there: " in capsys.readouterr().out
    os.utime(source, (1, 1))
    assert run(URL, source, *work) == 0
    assert "1 files uploaded" in capsys.readouterr().out, "the recipe, which has the times of the sources"
    source.write_text(json.dumps({"text": "other"}))
    assert run(URL, source, *work) == 2
    assert "got a folder of other settings: files." in capsys.readouterr().err
    assert not (tmp_path / "work").exists() and not (tmp_path / "work.partial").exists(), "refused before any work"


def test_a_command_that_is_killed_before_it_removes_its_local_copy_goes_on_with_that(
    source, memory, tmp_path, monkeypatch
):
    options = (source, "--work", tmp_path / "work", "--seq-len", 64)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda path, other: stop() if path.name == "work" else os.rename(path, other))
        with pytest.raises(Stop):
            run(URL, *options)
    before = files(memory)
    assert (tmp_path / "work" / INDEX_NAME).exists()
    assert run(URL, *options) == 0
    assert files(memory) == before and {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}


def test_of_two_commands_that_upload_one_folder_the_second_waits_and_finds_it_there(
    source, memory, tmp_path, writes, capsys, monkeypatch
):
    options, free, lock = (source, "--work", tmp_path / "work", "--seq-len", 64), [], upload.lock

    def overtaken(file, **how):
        monkeypatch.setattr(upload, "lock", lock)
        assert run(URL, *options) == 0, "by another process, which locks it first"
        return lock(file, **how)

    def try_lock(*_):
        with (tmp_path / "work" / "recipe.json").open("r+b") as file:
            free.append(lock(file))

    monkeypatch.setattr(upload, "lock", overtaken)
    writes[1].fault = try_lock
    assert run(URL, *options) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{URL}: already there: ")
    assert free == [False] * len(files(memory)) and {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}


def test_a_url_of_a_local_folder_is_written_and_read(source, tmp_path):
    url = f"file://{tmp_path / 'deeper' / 'data'}"
    assert run(tmp_path / "local", source, "--seq-len", 64) == 0
    assert run(url, source, "--work", tmp_path / "work", "--seq-len", 64) == 0
    assert content(tmp_path / "deeper" / "data") == content(tmp_path / "local")
    assert parse_index(as_folder(url, ShardCache(tmp_path / "cache", 10**9))) == parse_index(tmp_path / "local")


@pytest.mark.parametrize(
    ("out", "work", "said"),
    [
        (URL, None, f"--out URL must come with --work FOLDER, got '{URL}' alone"),
        ("data", "work", "--work must come with a URL as --out, got 'data'; leave it out"),
        (
            "https://host/data",
            "work",
            "by one of the protocols file, s3, gs, gcs, az, abfs, hf, memory, without ::",
        ),
        ("zip::s3://host/data", "work", "must name a folder by one of the protocols"),
        ("s3://", "work", "must name a folder by one of the protocols"),
        ("s3://bucket/data", "work", "needs a package that is missing (Install s3fs to access S3); install it"),
    ],
)
def test_outputs_that_cannot_be_used_are_refused_in_one_line(source, tmp_path, capsys, monkeypatch, out, work, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert run(out, source, *(() if work is None else ("--work", work))) == 2
    err = capsys.readouterr().err
    assert err.startswith("prepare: ") and err.count("\n") == 1 and said in err
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}
