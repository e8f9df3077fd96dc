"""The training and held-out packs that a model is evaluated on: those of its run, or of a folder that is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transfusion_fast.config import Config
from transfusion_fast.data.folder import Folder, ShardCache, is_url
from transfusion_fast.data.index import INDEX_NAME, Index
from transfusion_fast.data.loader import open_data
from transfusion_fast.data.mixture import Mixture, open_mixture
from transfusion_fast.errors import InputError
from transfusion_fast.training.run_folder import DataDescription

_FOLDERS = "evaluation needs a folder with train/ and heldout/, or a data folder"


@dataclass(frozen=True)
class Split:
    """Some packs of one data folder."""

    mixture: Mixture
    numbers: list[int]

    @property
    def folder(self) -> Folder:
        """The data folder."""
        return self.mixture.datasets[0].folder


def open_splits(
    run: Path, config: Config | None, data: DataDescription, given: Path | None
) -> tuple[Split | None, Split]:
    """Return the training packs, if there are any, and the held-out ones.

    Args:
        config: settings of the run, whose own data are taken without `given`.
        data: what the folders must fit.
        given: a data folder, all of which is held out, or a folder with heldout/ and perhaps train/.

    Raises:
        InputError: there is no such folder, or it does not fit the run.
    """
    train: Path | None
    if given is not None:
        within = (given / "heldout").is_dir()
        if not within and not (given / INDEX_NAME).is_file():
            raise InputError(f"{_FOLDERS}, got {given}; give --data")
        train, heldout = given / "train", (given / "heldout" if within else given)
    else:
        assert config is not None, "only an export can lack its settings, and has no data of its own"
        own = config.data
        if isinstance(own.path, str) and isinstance(own.heldout, float):
            mixture = open_data(config)
            _check_fits(mixture, data)
            rest = sorted({*range(mixture.num_packs)} - {*mixture.held_out})
            return Split(mixture, rest), Split(mixture, mixture.held_out)
        train = Path(own.path) if isinstance(own.path, str) and not is_url(own.path) else None
        named = Path(own.heldout) if isinstance(own.heldout, str) and not is_url(own.heldout) else None
        found = [path for path in (named, train and train.parent / "heldout") if path and path.is_dir()]
        if not found:
            raise InputError(f"{run}: was trained on {own.path}, and {_FOLDERS}; give --data")
        heldout = found[0]
    return (_open(train, data) if train and train.is_dir() else None), _open(heldout, data)


def _open(path: Path, data: DataDescription) -> Split:
    mixture = open_mixture({str(path): 1.0}, ShardCache(Path(), 0))  # local folders need no cache
    _check_fits(mixture, data)
    return Split(mixture, [*range(mixture.num_packs)])


def _check_fits(mixture: Mixture, data: DataDescription) -> None:
    """Raise InputError if a folder has another tokenizer or other images than the run; names may differ."""
    [dataset] = mixture.datasets
    for what, own, other in (
        ("tokenizer", dict(dataset.index.tokenizer), dict(data.tokenizer.describe())),
        ("modalities", _unnamed(dataset.index), [replace(one, name="image") for one in data.modalities]),
    ):
        if own and own != other:
            raise InputError(f"{what} of {dataset.folder} must be that of the run, {other!s:.200}, got {own!s:.200}")


def _unnamed(index: Index) -> list[object]:
    return [replace(one, name="image") for one in index.modalities]
