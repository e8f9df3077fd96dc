"""Layouts of interleaved documents as public datasets have them, turned into lists of texts and images.

A list has texts, `{"text": ..}` and `{"image": ..}`, whose value `references.image_bytes` reads. Objects may have
`"loss"` or `"weight"`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from transfusion_fast.errors import Rejected

Layout = Literal["content", "obelics", "mmc4", "conversations"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FIELDS = (
    "content", "conversations", "messages", "text_list", "image_info", "texts", "images", "image", "loss", "weight",
)  # fmt: skip
"""Names of all fields that are read."""
_SPEAKERS = {
    "human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant", "model": "Assistant",
    "bard": "Assistant", "system": "System",
}  # fmt: skip
_IMAGE = re.compile(r"<image>\n?|\n?<image>")


def content_of(record: Any, layout: Layout | None = None) -> list[Any]:
    """Return the texts and images of a record in order; Rejected if it has not the layout, or for None no known one."""
    if isinstance(record, list):
        record = {"content": record}
    if not isinstance(record, dict):
        raise Rejected("no content", f"the record must be an object or a list, got {type(record).__name__}")
    record = {name: value for name, value in record.items() if value is not None}  # as rows of tables have all columns
    for name in (layout,) if layout else LAYOUTS:
        if (content := _READERS[name](record)) is not None:
            return content
    found = ", ".join(map(str, list(record)[:8]))
    raise Rejected("no content", f"{found!r:.200} are not the fields of {layout or 'a known layout'}")


def _listed(record: dict[str, Any]) -> list[Any] | None:
    """Read `{"content": [..]}`, whose images without a value are those of `"images"` in turn."""
    content = record.get("content")
    return None if not isinstance(content, list) else _with_images(content, record)


def _with_images(content: list[Any], record: dict[str, Any]) -> list[Any]:
    """Return parts with `"type"` in the form without it."""
    images = list(_images_of(record))
    rest = iter(images)
    parts = [_untyped(part, rest) if isinstance(part, dict) and "type" in part else part for part in content]
    left = len(list(rest))
    if 0 < left < len(images):
        raise Rejected("no content", f"{left} images have no part of type image")
    return parts


def _untyped(part: dict[str, Any], images: Iterator[Any]) -> Any:
    """Return `{"type": "text" | "image" | "image_url", ..}` as `{"text": ..}` or `{"image": ..}`."""
    kind = part["type"]
    weights = _weights(part)
    if kind == "text":
        return {"text": part.get("text"), **weights}
    if kind not in ("image", "image_url"):
        return part  # which is rejected as an unknown part
    given = {name: value for name, value in part.items() if name not in ("type", *weights) and value is not None}
    value: Any = given.get(kind, given)
    if not value:
        value = next(images, None)
    return {"image": value, **weights}


def _weights(part: dict[str, Any]) -> dict[str, Any]:
    return {name: part[name] for name in ("loss", "weight") if part.get(name) is not None}


def _images_of(record: dict[str, Any]) -> Iterator[Any]:
    """Yield the values of `"images"`, or of `"image"`, one or several."""
    found = record.get("images", record.get("image"))
    yield from found if isinstance(found, list) else [] if found is None else [found]


def _obelics(record: dict[str, Any]) -> list[Any] | None:
    """Read OBELICS: lists `"texts"` and `"images"` of one length, of which one is null at each position."""
    match record:
        case {"texts": list(texts), "images": list(images)} if all(isinstance(t, str | None) for t in texts):
            if len(texts) != len(images) or any((t is None) == (i is None) for t, i in zip(texts, images, strict=True)):
                raise Rejected("no content", "at each position, one of texts and images must be null")
            return [text if image is None else {"image": image} for text, image in zip(texts, images, strict=True)]
    return None


def _mmc4(record: dict[str, Any]) -> list[Any] | None:
    """Read MMC4: sentences, and images that stand before the sentence that they match."""
    match record:
        case {"text_list": list(sentences), "image_info": list(infos)}:
            before: dict[Any, list[Any]] = {}
            for info in infos:
                if not isinstance(info, dict) or not isinstance(info.get("matched_text_index"), int):
                    raise Rejected("no content", f"an image must have a matched_text_index, got {info!r:.60}")
                data = info.get("image_base64")
                image = info.get("image_name") if data is None else {"base64": data}
                before.setdefault(info["matched_text_index"], []).append({"image": image})
            if beyond := [index for index in before if not 0 <= index < len(sentences)]:
                raise Rejected("no content", f"matched_text_index must be below {len(sentences)}, got {beyond[0]}")
            return [part for n, text in enumerate(sentences) for part in (*before.get(n, ()), _sentence(text, n))]
    return None


def _sentence(text: Any, number: int) -> str:
    if not isinstance(text, str):
        raise Rejected("no content", f"text_list must hold texts, got {text!r:.60}")
    return f" {text}" if number else text


def _conversations(record: dict[str, Any]) -> list[Any] | None:
    """Read turns of users and assistants: the loss is on what assistants say, all else is context."""
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        return None
    images = _images_of(record)
    content: list[dict[str, Any]] = []
    for turn in turns:
        speaker, said = _turn(turn)
        parts = [*_said(said, images), {"text": "\n"}]
        content.append({"text": f"{speaker}: ", "loss": False})
        content += parts if speaker == "Assistant" else map(_without_loss, parts)
    if left := len(list(images)):
        raise Rejected("no content", f"{left} images have no <image> in the conversation")
    return _joined(content)


def _without_loss(part: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in part.items() if name != "weight"}, "loss": False}


def _joined(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts with neighboring texts of equal weight joined, so that they are tokenized together."""
    joined: list[dict[str, Any]] = []
    for part in content:
        last = joined[-1] if joined else {}
        match last, part:
            case {"text": str(before)}, {"text": str(text)} if _weights(last) == _weights(part):
                joined[-1] = {**last, "text": before + text}
            case _:
                joined.append(part)
    return joined


def _turn(turn: Any) -> tuple[str, Any]:
    match turn:
        case {"from": str(role), "value": said} | {"role": str(role), "content": said}:
            if role in _SPEAKERS:
                return _SPEAKERS[role], said
            raise Rejected("unknown speaker", f"{role!r:.40} must be one of {', '.join(_SPEAKERS)}")
    raise Rejected("no content", f"a turn must have from and value, or role and content, got {turn!r:.60}")


def _said(said: Any, images: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """Yield the texts and images of a turn: `<image>` in a text, or a list of parts with `"type"`."""
    if isinstance(said, str):
        texts = _IMAGE.split(said)
        for number, text in enumerate(texts):
            if text:
                yield {"text": text}
            if number < len(texts) - 1:
                yield {"image": next(images, None)}
        return
    if not isinstance(said, list):
        raise Rejected("no content", f"a turn must hold a text or a list, got {said!r:.60}")
    for part in said:
        found = _untyped(part, images) if isinstance(part, dict) and "type" in part else part
        if not isinstance(found, dict | str):
            raise Rejected("unknown part", f"a turn must hold texts and images, got {found!r:.60}")
        yield {"text": found} if isinstance(found, str) else found


_READERS: dict[Layout, Callable[[dict[str, Any]], list[Any] | None]] = {
    "conversations": _conversations, "mmc4": _mmc4, "obelics": _obelics, "content": _listed,
}  # fmt: skip
