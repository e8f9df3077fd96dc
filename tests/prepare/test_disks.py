"""Disks that are full, have no locks, or are mounted where the output should be: one line, and nothing is lost."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from build_cases import content, cut_off, text_recipe, texts

from transfusion_fast.errors import InputError
from transfusion_fast.files import write_atomically
from transfusion_fast.prepare import staging
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.recipe import train_tokenizer
from transfusion_fast.prepare.spool import Spool


@pytest.fixture
def recipe(tmp_path):
    """Two files of texts, of which one is blank."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        texts(tmp_path / "in" / f"{name}.jsonl", name)
    (tmp_path / "in" / "c.txt").write_text("")
    return text_recipe(tmp_path / "in", packs_per_shard=5)


@pytest.mark.parametrize(
    ("file", "processes"),
    [
        ("units/000001.tokens", 1), ("units/000001.segments", 2), ("units/.000001.json.partial", 1),
        ("shards/.shard-000000.tar.partial", 1), ("shards/left_out.jsonl", 1), ("shards/.index.json.partial", 1),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_line_and_the_work_resumes(tmp_path, recipe, monkeypatch, file, processes):
    build(recipe, tmp_path / "whole")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    cut_off(recipe, out, monkeypatch)
    (partial / "units" / "000001.json").unlink()
    begun = content(partial / "units")
    (partial / file).unlink(missing_ok=True)
    (partial / file).symlink_to("/dev/full")
    rule = f"^file system of {partial} must have room, got No space left on device; make room and run it again"
    with pytest.raises(InputError, match=rule):
        build(recipe, out, processes)
    assert not out.exists()
    (partial / file).unlink()
    for name in ("000000.json", "000000.tokens"):
        assert content(partial / "units")[name] == begun[name], "what was finished stays"
    build(recipe, out)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_tokenizer_that_was_trained_survives_a_full_disk_or_quota(tmp_path, recipe, monkeypatch, code):
    def full(*_):
        raise OSError(code, os.strerror(code))

    tokenizer = train_tokenizer(recipe.source, 260, tmp_path / "out")
    trained = replace(recipe, encoder=replace(recipe.encoder, tokenizer=tokenizer), train_bpe=260)
    monkeypatch.setattr(Spool, "write", full)
    with pytest.raises(InputError, match="must have room"):
        build(trained, tmp_path / "out")
    monkeypatch.setattr("transfusion_fast.prepare.recipe.train_bpe", full)
    assert train_tokenizer(recipe.source, 260, tmp_path / "out").describe() == tokenizer.describe()


def test_a_file_that_finds_no_room_is_named(tmp_path):
    (tmp_path / ".a.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json'"):
        write_atomically(tmp_path / "a.json", "{}")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_line_and_nothing_stays_there(tmp_path, recipe, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(InputError, match=rf"file system of .*out\.partial.* must have locks .*{os.strerror(code)}"):
        build(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_that_is_a_mount_point_is_refused_at_once_unless_it_is_finished(tmp_path, recipe, monkeypatch):
    (tmp_path / "out").mkdir()
    mounts = tmp_path / "mountinfo"
    name = str(tmp_path / "out").replace("o", "\\157")  # as a space would be written
    mounts.write_text(f"36 35 98:0 /data {name} rw,noatime - ext4 /dev/root rw\n")
    for target, value in (("os.path.ismount", lambda path: Path(path).name == "out"), ("_MOUNTS", mounts)):
        with monkeypatch.context() as patched:
            patched.setattr(*((target, value) if "." in target else (staging, target, value)))
            with pytest.raises(InputError, match=r"must not be a mount point, got '.*out'; choose .* as '.*out/data'"):
                build(recipe, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    build(recipe, tmp_path / "out")
    monkeypatch.setattr(staging, "_MOUNTS", mounts)
    assert build(recipe, tmp_path / "out").reused
    build(recipe, tmp_path / "out" / "data")


def test_a_bind_mount_is_recognized(tmp_path):
    for name in ("disk", "an out"):
        (tmp_path / name).mkdir()
    code = "import sys; from transfusion_fast.prepare.staging import output_and_staging as o; o(sys.argv[1])"
    script = 'mount --bind disk "an out" && echo mounted && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    try:
        found = subprocess.run(
            [*command, sys.executable, "-c", code, "an out"], cwd=tmp_path, capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if "mounted" not in found.stdout:
        pytest.skip(f"needs the right to mount in a namespace of one's own: {found.stderr.strip():.80}")
    assert f"must not be a mount point, got '{tmp_path / 'an out'}'" in found.stderr
