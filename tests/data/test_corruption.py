"""The corruption matrix: whatever is done to a shard is named by `verify`, and no reader gives other data for it.

Nor does a run that may leave packs out: it leaves out those of that shard, and trains on all others as it would have.
"""

import io
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from transfusion_fast.config import load_config
from transfusion_fast.data.index import INDEX_NAME, file_sha256, parse_index, read_index
from transfusion_fast.data.loader import Share, open_data, training_batches
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.prepare import prepare
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import pack_spans, padded
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.data.verify import rebuild_index, verify
from transfusion_fast.errors import InputError

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
SHARD = "shard-000001.tar"
TRUNCATIONS = 20


def documents(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        caption = TextSegment(rng.integers(0, 256, 9, dtype=np.int32))
        yield caption, ImageSegment(rng.integers(0, 256, (4, 6, 1), dtype=np.uint8))


def write_folder(folder, seed=0):
    prepare(
        list(documents(seed)), folder,
        sequence_length=64, tokenizer=ByteTokenizer(), modalities=(GREY,), packs_per_shard=5,
    )  # fmt: skip
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    reader = PackReader(write_folder(tmp_path_factory.mktemp("expected") / "data"))
    return [reader.read(number) for number in range(len(reader))]


def patch(folder, start, data):
    path = folder / SHARD
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)


def flip(folder, at):
    patch(folder, at, bytes([(folder / SHARD).read_bytes()[at] ^ 0x10]))


def members(folder):
    with tarfile.open(folder / SHARD) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]


def rewrite(folder, entries):
    """The shard anew, of these (name, data); as a plain writer of tars would."""
    with tarfile.open(folder / SHARD, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def align_index(folder):
    """Makes the index say of the shard what lies there, so that only decoding it can object."""
    path = folder / SHARD
    content, spans = path.read_bytes(), pack_spans(path)
    crc32 = [zlib.crc32(content[start:end]) for start, end in spans]
    offsets = [start for start, _ in spans]
    edit_index(
        folder, bytes=len(content), sha256=file_sha256(path), offsets=offsets, end=spans[-1][1], crc32=crc32
    )  # fmt: skip


def replace_member(folder, data, number=3):
    entries = members(folder)
    rewrite(folder, [(name, data if i == number else old) for i, (name, old) in enumerate(entries)])
    align_index(folder)


def shard_of_another_folder(folder):
    other = write_folder(folder.with_name("another"), seed=1)
    (folder / SHARD).write_bytes((other / SHARD).read_bytes())


def append_header(folder, **fields):
    """A member before the end blocks whose header is valid and says what no shard has."""
    member = tarfile.TarInfo("x.npy")
    for name, value in fields.items():
        setattr(member, name, value)
    end = read_index(folder).shards[1].end
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:end] + member.tobuf(tarfile.GNU_FORMAT) + content[end:])


def truncate_at_fraction(part):
    def damage(folder):
        os.truncate(folder / SHARD, (folder / SHARD).stat().st_size * part // TRUNCATIONS)

    return damage


def truncate_between_packs(folder):
    os.truncate(folder / SHARD, read_index(folder).shards[1].offsets[2])


def truncate_between_members(folder):
    """Behind the first of a pack's three files."""
    start = read_index(folder).shards[1].offsets[2]
    with (folder / SHARD).open("rb") as stream:
        stream.seek(start)
        size = tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "strict").size
    os.truncate(folder / SHARD, start + tarfile.BLOCKSIZE + padded(size))


def truncate_before_the_end_blocks(folder):
    os.truncate(folder / SHARD, read_index(folder).shards[1].end)


def edit_index(folder, **changes):
    entry = json.loads((folder / INDEX_NAME).read_text())
    entry["shards"][1] |= changes
    (folder / INDEX_NAME).write_text(json.dumps(entry))


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


def absurd_shape():
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    return b"\x93NUMPY\x01\x00" + len(header.ljust(117) + b"\n").to_bytes(2, "little") + header.ljust(117) + b"\n"


def keys_alike(folder):
    entries = members(folder)
    second = entries[3][0].partition(".")[0]
    rewrite(folder, [(name.replace(entries[6][0].partition(".")[0], second), data) for name, data in entries])


def a_key_again(folder):
    entries = members(folder)
    first = entries[0][0].partition(".")[0]
    rewrite(folder, [(name.replace(entries[6][0].partition(".")[0], first), data) for name, data in entries])


IN_PACKS = {
    **{f"truncated at {part}/{TRUNCATIONS}": truncate_at_fraction(part) for part in range(TRUNCATIONS)},
    "truncated between packs": truncate_between_packs,
    "truncated between members of a pack": truncate_between_members,
    "header flipped": lambda folder: flip(folder, read_index(folder).shards[1].offsets[1] + 3),
    "checksum of a header flipped": lambda folder: flip(folder, read_index(folder).shards[1].offsets[1] + 150),
    "payload flipped": lambda folder: flip(folder, read_index(folder).shards[1].offsets[1] + 512 + 140),
    "block of zeros": lambda folder: patch(folder, read_index(folder).shards[1].offsets[1], bytes(512)),
    "empty file": lambda folder: (folder / SHARD).write_bytes(b""),
    "missing file": lambda folder: (folder / SHARD).unlink(),
    "npy with a pickle": lambda folder: replace_member(folder, npy(np.array([{"a": 1}], dtype=object))),
    "npy of absurd shape": lambda folder: replace_member(folder, absurd_shape()),
    "keys alike": keys_alike,
    "key again": a_key_again,
    "shard of another folder": shard_of_another_folder,
    "zeros from a pack on": lambda folder: patch(
        folder, (start := read_index(folder).shards[1].offsets[2]), bytes((folder / SHARD).stat().st_size - start)
    ),
    "a header of a hundred terabytes": lambda folder: append_header(folder, size=10**14),
    "a long name of a hundred terabytes": lambda folder: append_header(folder, size=10**14, type=b"L"),
    "a link": lambda folder: append_header(folder, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "index with an absurd size": lambda folder: edit_index(folder, bytes=10**15, end=10**15),
    "index with other offsets": lambda folder: edit_index(
        folder, offsets=[o + 512 * (i == 1) for i, o in enumerate(read_index(folder).shards[1].offsets)]
    ),
    "index with other crc32": lambda folder: edit_index(folder, crc32=[0] * 5),
    "index with another size": lambda folder: edit_index(folder, bytes=10**9),
}
ELSEWHERE = {
    "no end blocks": truncate_before_the_end_blocks,
    "index with another sha256": lambda folder: edit_index(folder, sha256="0" * 64),
}


def findings_of(folder):
    found = [finding for findings in verify(folder, parse_index(folder)) for finding in findings]
    assert all("\n" not in finding for finding in found)
    return found


def test_a_whole_folder_has_no_findings(folder):
    assert findings_of(folder) == []


@pytest.mark.parametrize("name", [*IN_PACKS, *ELSEWHERE])
def test_every_damage_is_found_and_its_shard_named(folder, name):
    (IN_PACKS | ELSEWHERE)[name](folder)
    found = findings_of(folder)
    assert found and any(SHARD in finding for finding in found)


@pytest.mark.parametrize("name", IN_PACKS)
def test_no_damage_is_read_past(folder, expected, name):
    """With the folder opened before and after: every pack is the one written, or an error that names the shard."""
    opened = PackReader(folder)
    IN_PACKS[name](folder)
    readers, errors = [opened], []
    try:
        readers.append(PackReader(folder))
    except InputError as error:
        errors.append(str(error))
    for reader in readers:
        for number, pack in enumerate(expected):
            try:
                got = reader.read(number)
            except InputError as error:
                errors.append(str(error))
                continue
            for field in ("tokens", "segments", "latents"):
                np.testing.assert_array_equal(getattr(got, field), getattr(pack, field), strict=True)
    assert errors and all(SHARD in error and "\n" not in error for error in errors)


def batches_of(folder):
    """An epoch of batches of a pack each, by the pack's number, of a run that may leave packs out."""
    overrides = [f"data.path={folder}", "data.workers=0", "data.quarantine=9", "model.dim_latent=4"]
    config = load_config(None, overrides)
    mixture = open_data(config)
    order = mixture.order(config.train.seed, config.data.shuffle_window)
    numbers = [order[position][1] for position in range(mixture.num_packs)]
    return dict(zip(numbers, training_batches(config, mixture, Share(0, 1, 1, 1), 0), strict=False))


@pytest.fixture(scope="module")
def expected_batches(tmp_path_factory):
    return batches_of(write_folder(tmp_path_factory.mktemp("expected") / "data"))


@pytest.mark.parametrize("name", [*IN_PACKS, *ELSEWHERE])
def test_no_damage_stops_or_changes_a_run_that_may_leave_packs_out(folder, expected_batches, name):
    (IN_PACKS | ELSEWHERE)[name](folder)
    found, bad = batches_of(folder), set()
    assert found.keys() == expected_batches.keys()
    for number, (batch, unreadable, unfetched) in found.items():
        assert not unfetched
        if unreadable:
            (line,) = unreadable
            assert SHARD in line and "\n" not in line
            bad.add(number)
            continue
        whole = expected_batches[number].batch
        assert batch.num_tokens == whole.num_tokens > 0
        for one, other in ((batch, whole), *zip(batch.modalities, whole.modalities, strict=True)):
            for field, value in vars(other).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(getattr(one, field), value), field
    assert bad <= set(range(5, 10)) and (bad or name in ELSEWHERE)


@pytest.mark.parametrize("name", [name for name in [*IN_PACKS, *ELSEWHERE] if not name.startswith("index")])
def test_a_shard_that_is_not_whole_is_not_indexed_anew(folder, name):
    (IN_PACKS | ELSEWHERE)[name](folder)
    before = (folder / INDEX_NAME).read_bytes()
    with pytest.raises(InputError, match=SHARD):
        rebuild_index(folder)
    assert (folder / INDEX_NAME).read_bytes() == before


@pytest.mark.parametrize("name", [name for name in [*IN_PACKS, *ELSEWHERE] if name.startswith("index")])
def test_a_wrong_index_is_rebuilt_as_it_was(folder, name):
    before = (folder / INDEX_NAME).read_bytes()
    (IN_PACKS | ELSEWHERE)[name](folder)
    rebuild_index(folder, accept="sha256" in name)
    assert (folder / INDEX_NAME).read_bytes() == before
    assert findings_of(folder) == []


def test_shards_that_differ_from_the_old_index_are_taken_when_accepted(folder):
    write_folder(folder.with_name("whole"))
    (folder / SHARD).unlink()
    with pytest.raises(InputError, match=r"is missing; .* --accept"):
        rebuild_index(folder)
    before = read_index(folder.with_name("whole")).num_packs
    assert rebuild_index(folder, accept=True).num_packs == before - 5
    assert findings_of(folder) == []


def test_a_name_that_no_reader_takes_is_not_indexed(folder):
    before = (folder / INDEX_NAME).read_bytes()
    (folder / "shard-000001 (1).tar").write_bytes((folder / SHARD).read_bytes())
    with pytest.raises(InputError, match=r"shard-000001 \(1\).tar"):
        rebuild_index(folder)
    assert (folder / INDEX_NAME).read_bytes() == before


def test_an_index_that_is_gone_is_made_like_that_of_another_folder(folder, tmp_path):
    other = write_folder(tmp_path / "other")
    before = (folder / INDEX_NAME).read_bytes()
    (folder / INDEX_NAME).unlink()
    with pytest.raises(InputError, match=INDEX_NAME):
        rebuild_index(folder)
    rebuild_index(folder, like=other)
    assert (folder / INDEX_NAME).read_bytes() == before


def test_shards_beside_the_index_and_wrong_sums_are_found(folder):
    entry = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps({**entry, "documents": 7}))
    (folder / "shard-000099.tar").write_bytes((folder / SHARD).read_bytes())
    counts, strange = findings_of(folder)
    assert "40 documents" in counts and "got 7" in counts
    assert "shard-000099.tar" in strange


class Planted:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_nothing_planted_in_a_folder_is_run(folder, tmp_path, monkeypatch):
    """Pickles under every extension that WebDataset decodes, a command as a shard's name, and a name that leads out."""
    trace = tmp_path / "trace"
    data = pickle.dumps(Planted(trace))
    pickle.loads(data)
    assert trace.exists(), "the plant works"
    trace.unlink()
    whole = members(folder)
    for name in ("000001-000001.pyd", "000001-000001.pth", "000001-000001.pickle", "../escaped.npy", whole[3][0]):
        rewrite(folder, [*whole[:3], (name, data), *whole[4:]])
        align_index(folder)
        assert findings_of(folder)
        with pytest.raises(InputError, match=SHARD):
            [reader.read(number) for reader in [PackReader(folder)] for number in range(len(reader))]
        with pytest.raises(InputError):
            rebuild_index(folder)
    rewrite(folder, whole)
    align_index(folder)
    assert findings_of(folder) == []
    monkeypatch.chdir(tmp_path)
    for file in (f"pipe:touch {trace}", "../data/shard-000000.tar", "/etc/passwd"):
        edit_index(folder, file=file)
        for action in (read_index, findings_of, rebuild_index, PackReader):
            with pytest.raises(InputError, match="plain name"):
                action(folder)
    assert not trace.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
