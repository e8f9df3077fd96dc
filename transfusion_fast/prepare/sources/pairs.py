"""Image-text pairs: WebDataset tars, folders of images with captions beside them, or records with images or paths."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources import image_folders, tars
from transfusion_fast.prepare.sources.base import Source, Unit, decode_utf8, parse_json
from transfusion_fast.prepare.sources.files import kind_of, source_files, system_file, walk
from transfusion_fast.prepare.sources.image_folders import IMAGES, extension_of
from transfusion_fast.prepare.sources.records import RECORDS, first_field, read_records, record_units
from transfusion_fast.prepare.sources.references import check_root, image_bytes
from transfusion_fast.prepare.sources.tables import column_type

Layout = Literal["tar", "files", "records"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
CAPTION_EXTENSIONS = ("txt", "caption", "text")
CAPTION_FIELDS = ("caption", "text", "txt", "captions", "TEXT")
IMAGE_FIELDS = (
    "image", "jpg", "jpeg", "png", "webp", "img", "file_name", "filename", "filepath", "image_path", "image_file",
    "file", "path",
)  # fmt: skip
"""Names of the fields that are looked at if none is named, the first that is set."""
_STORED_IMAGE = {"bytes", "path"}
"""Fields of the structure in which `datasets` stores an image."""
_METADATA = "metadata."  # the beginning of the name of the list that the hub's image folders have
_LAYOUTS_BY_KIND: dict[str, Layout] = {"tar": "tar", "metadata": "records", "image": "files", "records": "records"}
"""The layout of a folder that holds files of such kinds, the first of them."""


@dataclass(frozen=True)
class PairsSource(Source):
    """Captioned images, caption first."""

    layout: Layout = "tar"
    caption_field: str | None = None
    """Field of the caption, or extension of the file that holds it; None for the first of the usual names."""
    image_field: str | None = None
    """Field of the image, or extension of its file; None for the first of the usual names."""
    image_root: Path | None = None
    """Folder that the paths in records are relative to; None for that of their file."""

    def __post_init__(self) -> None:
        check_root(self.image_root)

    @classmethod
    def of(cls, paths: Sequence[Path], **settings: Any) -> Self:
        """Return the source of these files and folders; see `Source.of`. The layout is detected unless it is given."""
        layout = settings.pop("layout", None) or _layout_of(paths)
        if layout != "records" and settings.get("image_root") is not None:
            raise InputError(f"--image-root must come with records, got layout {layout}; leave it out")
        match layout:
            case "files":
                return cls(image_folders.folders_with_images(paths), layout=layout, **settings)
            case "tar":
                files, passed_over = source_files(paths, (".tar",))
            case _:
                files, passed_over = _record_files(paths)
        return cls(files, passed_over=passed_over, layout=layout, **settings)

    def units(self) -> list[Unit]:
        match self.layout:
            case "tar":
                return [Unit(file, 0, file.stat().st_size) for file in self.files]
            case "files":
                return [unit for folder in self.files for unit in image_folders.folder_units(folder)]
            case "records":
                return [unit for file in self.files for unit in record_units(file, self._columns)]

    def states(self) -> dict[str, dict[str, int]]:
        if self.layout == "files":
            return {str(folder.resolve()): image_folders.folder_state(folder) for folder in self.files}
        return super().states()

    def spans(self, unit: Unit) -> list[tuple[Path, int, int]]:
        if self.layout == "files":
            return [(file, 0, file.stat().st_size) for file in image_folders.files_of(unit) if file.is_file()]
        return super().spans(unit)

    def entries(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        match self.layout:
            case "tar":
                return tars.read_samples(unit.path, self._wanted)
            case "files":
                return image_folders.read_images(unit, self._wanted)
            case "records":
                return read_records(unit, self._columns)

    def parts(self, entry: Any, unit: Unit) -> tuple[str, bytes]:
        if self.layout == "records":
            image = self._image_of_record(entry, unit.path.parent)
            caption = self._caption_of_record(entry)
        else:
            image, caption = self._image_of_sample(entry), self._caption_of_sample(entry)
            if caption is None and self.layout == "files":
                beside = "no file beside the image holds one; if a list does, name it, or use --layout records"
                raise Rejected("no caption", beside)
        return _chosen_caption(caption, image), image

    def record(self, entry: Any, unit: Unit) -> Any:
        return entry if self.layout == "records" else _json_of(entry)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "pairs",
            "layout": self.layout,
            "caption_field": self.caption_field,
            "image_field": self.image_field,
            "image_root": None if self.image_root is None else str(self.image_root.resolve()),
        }

    @property
    def _caption_fields(self) -> tuple[str, ...]:
        return CAPTION_FIELDS if self.caption_field is None else (self.caption_field,)

    @property
    def _image_fields(self) -> tuple[str, ...]:
        return IMAGE_FIELDS if self.image_field is None else (self.image_field,)

    def _wanted(self, extension: str) -> bool:
        """Return whether a file of a sample may be its image or hold its caption."""
        kind = extension.rpartition(".")[2]
        if kind in IMAGES:
            return self.image_field in (None, extension)
        return kind in (*CAPTION_EXTENSIONS, "json") or extension in (self.caption_field, self.image_field)

    def _image_of_sample(self, sample: tars.Sample) -> bytes:
        kinds = IMAGES if self.image_field is None else (self.image_field,)
        image = _one_of(kinds, sample, "--image-field")
        if image is None:
            raise Rejected("no image", f"none of {', '.join(kinds)}")
        return sample[image]

    def _caption_of_sample(self, sample: tars.Sample) -> Any:
        if self.caption_field in sample:
            return sample[self.caption_field]
        if self.caption_field is None and (file := _one_of(CAPTION_EXTENSIONS, sample, "--caption-field")):
            return sample[file]
        return first_field(_json_of(sample), self._caption_fields)

    def _image_of_record(self, record: Any, folder: Path) -> bytes:
        value = first_field(record, self._image_fields)
        if value is None and self.image_field is None and isinstance(record, dict):
            values = [found for found in record.values() if isinstance(found, dict) and found.keys() == _STORED_IMAGE]
            value = values[0] if len(values) == 1 else None
        if value is None:
            raise _missing("image", record)
        return image_bytes(value, folder if self.image_root is None else self.image_root)

    def _caption_of_record(self, record: Any) -> Any:
        caption = first_field(record, self._caption_fields)
        if caption is None:
            raise _missing("caption", record)
        return caption

    def _columns(self, schema: Any) -> list[str]:
        """Return the columns of image and caption; Rejected if a table lacks one of them."""
        image, caption = (_among(schema.names, fields) for fields in (self._image_fields, self._caption_fields))
        stored = [name for name in schema.names if _holds_images(column_type(schema, name))]
        image = image or (stored if len(stored) == 1 else [])
        names = ", ".join(schema.names)
        for found, what in ((image, "image"), (caption, "caption")):
            if not found:
                raise Rejected(f"no {what}", f"no column for it among {names!r:.200}; name one with --{what}-field")
        return list(dict.fromkeys([*image, *caption, *(name for name in self.fields if name in schema.names)]))


def _record_files(paths: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[Rejected, ...]]:
    """Return the files of records; of folders that have metadata files as the hub's image folders do, these alone."""
    files, passed_over = source_files(paths, RECORDS)
    lists = [file for file in files if file.name.startswith(_METADATA)]
    if not lists or not all(path.is_dir() for path in paths):
        return files, passed_over
    others = [file for file in files if not file.name.startswith(_METADATA)]
    more = [Rejected("accompanying file", f"{file} is not read beside {lists[0].name}") for file in others]
    return tuple(lists), (*passed_over, *more)


def _among(columns: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Return the columns that hold these fields; `a.b` is a column of this name, or in column a."""
    names = [field if field in columns else field.partition(".")[0] for field in fields]
    return [name for name in names if name in columns]


def _missing(what: str, record: Any) -> Rejected:
    names = ", ".join(map(str, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
    return Rejected(f"no {what}", f"none in the fields of {names!r:.200}; name one with --{what}-field")


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    return types.is_struct(kind) and {field.name for field in kind} == _STORED_IMAGE


def _one_of(kinds: Sequence[str], sample: Mapping[str, bytes], option: str) -> str | None:
    """Return the extension of a sample's file of these kinds: the first of them, or the only one of NAME.KIND."""
    if exact := next((kind for kind in kinds if kind in sample), None):
        return exact
    named = [extension for extension in sample if extension.rpartition(".")[2] in kinds]
    if len(named) > 1:
        raise Rejected("several files", f"{', '.join(named)!r:.80} are of one kind; name one with {option}")
    return named[0] if named else None


def _json_of(sample: tars.Sample) -> Any:
    file = _one_of(("json",), sample, "--caption-field")
    return parse_json(sample[file]) if file else None


def _chosen_caption(value: Any, image: bytes) -> str:
    """Return a caption. From a list, one is drawn by a hash of captions and image, so that a rerun draws the same."""
    values = value if isinstance(value, list) else [value]
    decoded = [decode_utf8(text, "utf-8-sig") if isinstance(text, bytes) else text for text in values]
    captions = [text.strip() for text in decoded if isinstance(text, str) and text.strip()]
    if not captions:
        raise Rejected("no caption", "")
    if len(captions) == 1:
        return captions[0]
    key = zlib.crc32("\0".join(captions).encode("utf-8", "surrogatepass"))
    return captions[keyed_permutation(len(captions), zlib.crc32(image), key)[0]]


def _layout_of(paths: Sequence[Path]) -> Layout:
    """Return the layout of files and folders; InputError if they have several, or none."""
    found = {path: _layout_in(path) for path in paths}
    if len({*found.values()}) > 1:
        shown = ", ".join(f"{layout} ({path})" for path, layout in list(found.items())[:3])
        raise InputError(f"sources must have one layout, got {shown}; prepare each on its own, or give --layout")
    return next(iter(found.values()))


def _layout_in(path: Path) -> Layout:
    if not path.is_dir():
        return "records" if kind_of(path) in RECORDS else "tar"
    found = {kind for file in walk(path) if not system_file(file.name) for kind in _kinds_of(file)}
    for kind, layout in _LAYOUTS_BY_KIND.items():
        if kind in found:
            return layout
    raise InputError(f"folder {path} must hold tars, images or records, got none of these; give another")


def _kinds_of(file: Path) -> Iterator[str]:
    if kind_of(file) == ".tar":
        yield "tar"
    if extension_of(file.name) in IMAGES:
        yield "image"
    if kind_of(file) in RECORDS:
        yield "metadata" if file.name.startswith(_METADATA) else "records"
