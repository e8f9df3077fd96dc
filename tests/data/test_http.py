"""Data folders on a web server: what the server must support, and which of its faults are retried."""

import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from remote_cases import assert_reads, refusal, run_forked

from transfusion_fast.data.folder import FetchError, Folder, ShardCache, as_folder
from transfusion_fast.data.index import INDEX_NAME, parse_index
from transfusion_fast.data.pack import TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer, load_tokenizer
from transfusion_fast.prepare.examples.built_in import prepare


class Server(ThreadingHTTPServer):
    """A server of a folder. `faults` are its faults at the next requests for shards, one each, the last one forever."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.faults: list[str] = [""]
        self.ended = Event()
        self.requests: list[str] = []
        self.endless_blocks = 0


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def parse_request(self) -> bool:
        found = super().parse_request()
        self.server.requests.append(f"{self.command} {self.path}")
        return found

    def do_GET(self) -> None:
        faults = self.server.faults if self.path.endswith(".tar") else [""]
        fault = faults[0] if len(faults) == 1 else faults.pop(0)
        content = Path(self.translate_path(self.path))
        if fault.isdigit() or not content.exists():
            return self.send_error(int(fault or 404))
        data = content.read_bytes()
        self.send_response(200)
        if fault != "endless":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault in ("broken off", "silent") else data)
        if fault == "silent":
            self.wfile.flush()
            self.server.ended.wait(30)
        while fault == "endless":
            try:
                self.wfile.write(bytes(1 << 20))
                self.server.endless_blocks += 1
            except ConnectionError:
                break


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A shard of 8 MB, more than clients request at a time."""
    folder, size = tmp_path_factory.mktemp("large") / "packs", 2 * 10**6
    text = TextSegment(np.random.default_rng(0).integers(0, 256, size, dtype=np.int32))
    prepare([(text,)], folder, sequence_length=size + 9, tokenizer=ByteTokenizer(), modalities=(), packs_per_shard=1)
    return folder


@pytest.fixture
def served() -> Iterator:
    """A function that starts the server of a folder."""
    servers: list[Server] = []

    def serve(folder: Path) -> Server:
        servers.append(Server(folder))
        Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.ended.set()
        server.shutdown()
        server.server_close()


def at(server: Server, cache: Path, folder: str = "") -> Folder:
    return as_folder(f"http://127.0.0.1:{server.server_port}{folder}", ShardCache(cache, 10**9))


def test_a_folder_on_a_server_is_read_like_a_local_one_with_one_request_a_file(source, large, tmp_path, served):
    for folder in (source, large):
        server = served(folder)
        far = at(server, tmp_path / "cache")
        index = parse_index(far)
        assert index == parse_index(folder)
        assert_reads(PackReader(far, index), folder)
        assert load_tokenizer(index.tokenizer, far).describe() == index.tokenizer
        files = [INDEX_NAME, *(shard.file for shard in index.shards)]
        assert [request for request in server.requests if "tokenizer" not in request] == [
            f"GET /{file}" for file in files
        ], "each is requested once, as a whole"


def test_a_process_forked_after_a_fetch_can_fetch_too(source, tmp_path, served):
    reader = PackReader(at(served(source), tmp_path / "cache"))
    assert_reads(reader, source, [0])
    run_forked(lambda: assert_reads(reader, source), timeout=30)
    assert_reads(reader, source)


def test_a_missing_file_is_named_without_a_retry(source, tmp_path, served, waits):
    server = served(source)
    assert "FileNotFoundError" in refusal(parse_index, at(server, tmp_path / "c", "/elsewhere"), kind=FetchError)
    reader = PackReader(at(server, tmp_path / "cache"))
    server.faults = ["404"]
    message = refusal(reader.read, 4, kind=FetchError)
    assert "/shard-000001.tar must be fetched, got FileNotFoundError" in message
    assert waits == []


@pytest.mark.parametrize("fault", ["broken off", "503"])
def test_a_fault_of_the_server_is_retried(source, tmp_path, served, waits, fault):
    server = served(source)
    reader = PackReader(at(server, tmp_path / "cache"))
    server.faults = [fault, fault, ""]
    assert_reads(reader, source, [0])
    assert waits == [1, 2]
    server.faults = [fault]
    message = refusal(reader.read, 4, kind=FetchError)
    assert "/shard-000001.tar must be fetched, got Client" in message
    assert waits == [1, 2, 1, 2, 4]
    server.faults = [""]
    assert_reads(reader, source)


def test_a_request_to_a_silent_server_is_repeated(source, tmp_path, served, waits, monkeypatch):
    monkeypatch.setattr("transfusion_fast.data.folder.SILENCE_TIMEOUT", 0.5)
    server = served(source)
    reader = PackReader(at(server, tmp_path / "cache"))
    server.faults = ["silent", ""]
    began = time.monotonic()
    assert_reads(reader, source, [0])
    assert waits == [1] and time.monotonic() - began < 20, "the server would close the connection after 30 seconds"


def test_an_endless_download_is_stopped(source, tmp_path, served):
    server = served(source)
    reader = PackReader(at(server, tmp_path / "cache"))
    server.faults = ["endless", "endless", ""]
    assert "as its index says, got more" in refusal(reader.read, 0)
    assert server.endless_blocks < 200
    assert_reads(reader, source, [3])
