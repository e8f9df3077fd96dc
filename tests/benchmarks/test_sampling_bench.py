"""The benchmark of decoding, at sizes that take a second."""

import pandas as pd
import sampling_bench


def test_every_way_of_each_task_is_timed_against_the_first(tmp_path, monkeypatch):
    sizes = {"WIDTH": 32, "DEPTH": 1, "HEADS": 2, "CONTEXT": 24, "PROMPT": 40, "SIDE": 3, "DIGITS": 4, "TOKENS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(sampling_bench, name, size)
    monkeypatch.setattr(sampling_bench, "peer_text", lambda *_: {})
    assert sampling_bench.main(["--out", str(tmp_path), "--device", "cpu", "--seconds", "0"]) == 0
    rows = pd.read_csv(tmp_path / "sampling.csv")
    text = ["cache", "whole sequences", "its products and attention"]
    assert rows.way.tolist() == [*text, "together", "one by one", "cache", "whole sequences"]
    assert rows.task.nunique() == 3 and (rows.p50_ms > 0).all()
    assert (rows.times_the_first[[0, 3, 5]] == 1).all() and (rows.times_the_first > 0).all()
    assert "| a token of text after 24 | cache |" in (tmp_path / "sampling.md").read_text()
