"""The corruption matrix: whatever is done to a shard is named by `verify`, and no reader gives other data for it.

Nor does a run that may leave packs out: it leaves out those of that shard, and trains on all others as it would have.
"""

import pickle
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_damage import (
    COUNTS,
    ELSEWHERE,
    IN_PACKS,
    SHARD,
    edit_index,
    findings_of,
    members,
    rewrite,
    rewrite_packs,
    write_folder,
)

from transfusion_fast.config import load_config
from transfusion_fast.data.index import read_index
from transfusion_fast.data.loader import Share, open_data, training_batches
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import TABLE
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.inspect import rebuild_index


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    reader = PackReader(write_folder(tmp_path_factory.mktemp("expected") / "data"))
    return [reader.read(number) for number in range(len(reader))]


def test_a_whole_folder_has_no_findings(folder):
    assert findings_of(folder) == []


@pytest.mark.parametrize("name", [*IN_PACKS, *ELSEWHERE, *COUNTS])
def test_every_damage_is_found_and_its_shard_named(folder, name):
    (IN_PACKS | ELSEWHERE | COUNTS)[name](folder)
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
    whole = members(folder)[:-1]
    for name in ("000001-000001.pyd", "000001-000001.pth", "000001-000001.pickle", "../escaped.npy", whole[3][0]):
        rewrite_packs(folder, [*whole[:3], (name, data), *whole[4:]])
        with suppress(InputError):  # the index itself, of packs that are too small
            assert findings_of(folder)
        with pytest.raises(InputError):
            [reader.read(number) for reader in [PackReader(folder)] for number in range(len(reader))]
        with pytest.raises(InputError):
            rebuild_index(folder)
    rewrite(folder, [*whole, (TABLE, data)])  # where no pickle is looked for either
    assert findings_of(folder)
    with pytest.raises(InputError, match=SHARD):
        rebuild_index(folder)
    rewrite_packs(folder, whole)
    assert findings_of(folder) == []
    monkeypatch.chdir(tmp_path)
    for file in (f"pipe:touch {trace}", "../data/shard-000000.tar", "/etc/passwd"):
        edit_index(folder, file=file)
        for action in (read_index, findings_of, rebuild_index, PackReader):
            with pytest.raises(InputError, match="plain name"):
                action(folder)
    assert not trace.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
