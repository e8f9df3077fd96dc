"""Files of .json give their records, whether as one list, one after another, or a line each, and damage is named."""

import gzip
import json

import pytest
from build_cases import found_in, texts_of
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.prepare.sources import json_values
from transfusion_fast.prepare.sources.json_values import has_json_lines, read_values
from transfusion_fast.prepare.sources.text import TextSource

RECORDS = [{"text": f"text {n} é"} for n in range(50)]
TEXTS = [record["text"] for record in RECORDS]
FORMS = {
    "list": json.dumps(RECORDS),
    "indented list": json.dumps(RECORDS, indent=2),
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "lines, the first damaged": "\n".join(['{"text', *map(json.dumps, RECORDS)]),
    "indented objects": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(json_values, "_BLOCK", 7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_records_are_found_in_every_form(tmp_path, small_blocks, form, suffix):
    content = FORMS[form].encode("utf-8-sig")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    texts, rejected = texts_of([path])
    assert texts == TEXTS and rejected.total() == ("damaged" in form)
    assert has_json_lines(path) == ("lines" in form)


def test_one_record_in_a_file_is_read(tmp_path):
    for number, content in enumerate(
        ('{"text": "one"}', '{\n "text": "one"\n}\n', '[{"text": "one"}]\n', '[\n{"text": "one"}\n]')
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        assert texts_of([path]) == (["one"], {})
    assert texts_of([tmp_path]) == (["one"] * 4, {})


@given(st.lists(st.recursive(st.none() | st.integers() | st.text(max_size=9), st.lists, max_leaves=5), max_size=6))
def test_values_are_the_same_wherever_blocks_end(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patched:
        for size in (1, 5, 1 << 20):
            patched.setattr(json_values, "_BLOCK", size)
            assert [value for _, value in read_values(path)] == values


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda content: content[:-40], "not JSON"),
    (lambda content: content[:-1], "not JSON"),
    (lambda content: content.replace(b"text 40", b"text \xff"), "not UTF-8"),
    (lambda content: content.replace(b': "text 40', b'; "text 40'), "not JSON"),
])  # fmt: skip
def test_what_lies_before_damage_is_read_and_the_rest_is_named(tmp_path, small_blocks, damage, reason):
    path = tmp_path / "a.json"
    path.write_bytes(damage(json.dumps(RECORDS, indent=1).encode()))
    *good, last = found_in(TextSource.of([path]))
    assert len(good) >= 39 and [document.parts[0] for document in good] == TEXTS[: len(good)]
    assert last.reason == reason and f"value {len(good)} of {path}" in last.detail


def test_the_work_on_a_large_value_is_in_proportion_to_its_size(tmp_path, small_blocks, monkeypatch):
    decoded = []
    decode = json_values._decode
    monkeypatch.setattr(json_values, "_decode", lambda text, at: decoded.append(len(text)) or decode(text, at))
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 50_000}]))
    assert len(texts_of([path])[0][0]) == 50_000 and sum(decoded) < 200_000


def test_a_value_that_is_too_large_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "MAX_BYTES", 1000)
    monkeypatch.setattr(json_values, "_BLOCK", 100)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "good"}, {"text": "x" * 100_000}], indent=1))
    monkeypatch.setattr(json_values.codecs, "getincrementaldecoder", limited(json_values.codecs.getincrementaldecoder))
    assert texts_of([path]) == (["good"], {"not JSON": 1})


def limited(of):
    """Decoders that refuse to decode more than 4000 bytes altogether."""

    def make(encoding):
        class Decoder(of(encoding)):
            count = 0

            def decode(self, block, final=False):
                self.count += len(block)
                assert self.count < 4000
                return super().decode(block, final)

        return Decoder

    return make
