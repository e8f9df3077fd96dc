"""The corruption matrix: `verify` names every damage to a shard, and no reader returns other data because of it."""

import pickle
import shutil

import pytest
from shard_damage import (
    COUNTS,
    ELSEWHERE,
    IN_PACKS,
    SHARD,
    Planted,
    assert_same_pack,
    edit_index,
    findings_of,
    members,
    replace_packs,
    tar_members,
    write_folder,
)

from transfusion_fast.data.index import parse_index, read_index
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import TABLE
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.inspect import rebuild_index


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("intact") / "data")


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "data")


@pytest.fixture(scope="module")
def expected(intact):
    reader = PackReader(intact)
    return [reader.read(number) for number in range(len(reader))]


@pytest.mark.parametrize("name", [*IN_PACKS, *ELSEWHERE, *COUNTS])
def test_every_damage_is_found_and_its_shard_named(folder, name):
    assert findings_of(folder) == []
    (IN_PACKS | ELSEWHERE | COUNTS)[name](folder)
    found = findings_of(folder)
    assert found and any(SHARD in finding for finding in found)


@pytest.mark.parametrize("name", [*IN_PACKS, *ELSEWHERE])
def test_no_reader_returns_damaged_packs_or_loses_those_of_other_shards(folder, expected, name):
    """Readers opened before and after the damage return packs as they were written, or an error naming the shard."""
    opened = PackReader(folder)
    (IN_PACKS | ELSEWHERE)[name](folder)
    for reader in (opened, PackReader(folder, parse_index(folder))):
        bad = set()
        for number, pack in enumerate(expected):
            try:
                got = reader.read(number)
            except InputError as error:
                assert SHARD in str(error) and "\n" not in str(error)
                bad.add(number)
            else:
                assert_same_pack(got, pack)
        assert bad <= set(range(5, 10)) and (bad or reader is opened or name in ELSEWHERE)


def test_nothing_planted_in_a_folder_is_run(folder, tmp_path, monkeypatch):
    """Pickles under every extension that WebDataset decodes, commands as shard names, and paths out of the folder."""
    trace = tmp_path / "trace"
    data = pickle.dumps(Planted(trace))
    pickle.loads(data)
    assert trace.exists(), "the pickle is harmless"
    trace.unlink()
    entries = members(folder)
    for name in ("000001-000001.pyd", "000001-000001.pth", "000001-000001.pickle", "../escaped.npy", entries[3][0]):
        replace_packs(folder, [*entries[:3], (name, data), *entries[4:]])
        assert findings_of(folder)
        with pytest.raises(InputError, match=SHARD):
            PackReader(folder).read(6)
        with pytest.raises(InputError, match=SHARD):
            rebuild_index(folder)
    (folder / SHARD).write_bytes(tar_members([*entries, (TABLE, data)]) + bytes(10240))
    assert findings_of(folder)
    with pytest.raises(InputError, match=SHARD):
        rebuild_index(folder)
    replace_packs(folder, entries)
    assert findings_of(folder) == []
    monkeypatch.chdir(tmp_path)
    for file in (f"pipe:touch {trace}", "../data/shard-000000.tar", "/etc/passwd"):
        edit_index(folder, file=file)
        for action in (read_index, findings_of, rebuild_index, PackReader):
            with pytest.raises(InputError, match=r"shards\.1\.file in .* must match pattern"):
                action(folder)
    assert not trace.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
