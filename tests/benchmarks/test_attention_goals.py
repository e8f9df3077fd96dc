"""Goals are judged on an H100 only, against what was measured beside a row or published."""

import re

import pytest
from attention_goals import judge

MACHINE = {"hardware": "NVIDIA H100 80GB HBM3"}


def row(backend, mean, ms, rates, **changes):
    shape = {"mix": f"mean{mean}", "T": 16384, "H": 16, "G": 16, "D": 128, "dtype": "bfloat16", "mean_length": mean}
    times = {"forward_p50": ms, "backward_p50": 2 * ms, "forward_tflops": rates[0], "backward_tflops": rates[1]}
    return {**MACHINE, **shape, "backend": backend, "kernel": "", "status": "ok", **times} | changes


def outcomes(*rows):
    cells = [re.split(r" *\| *", line.strip("| ")) for line in judge(rows).splitlines() if line.startswith("| mean")]
    return [(goal, wanted, reached, outcome) for *_, goal, wanted, reached, outcome in cells]


def test_short_documents_are_held_to_fa3_of_the_same_run():
    fa3 = row("flash_varlen_causal", 512, 1, (200, 300), kernel="flash_attn_interface")
    flex = row("flex", 512, 1, (0, 0), backward_p50=6.5)
    assert outcomes(row("triton", 512, 1, (200, 299)), flex, fa3) == [
        ("2.5 x FlexAttention", "2.5", "2.5", "pass"),
        ("FA3, varlen causal: forward, TFLOP/s", "200", "200", "pass"),
        ("FA3, varlen causal: backward, TFLOP/s", "300", "299", "fail"),
    ]
    missing = outcomes(row("triton", 512, 1, (200, 299)), flex, fa3 | {"kernel": "flash_attn"})[1:]
    assert [outcome for *_, outcome in missing] == 2 * ["not measured: no rate of flash_attn_interface"]


@pytest.mark.parametrize(("mean", "wanted"), [(1024, ["528", "314"]), (2048, ["528", "314"]), (4096, ["572", "363"])])
def test_long_documents_are_held_to_the_published_rates_of_ffa(mean, wanted):
    slow, *published = outcomes(row("triton", mean, 1, (540, 310)), row("flex", mean, 2.4, (0, 0)))
    assert slow[-1] == "fail"
    assert [line[1] for line in published] == wanted
    assert [line[-1] for line in published] == (["pass", "fail"] if mean < 4096 else ["fail", "fail"])


def test_what_was_not_measured_is_neither_reached_nor_missed():
    late = row("triton", 1024, 1, (0, 0), status="not measured: time budget")
    assert [(reached, outcome) for *_, reached, outcome in outcomes(late)] == 3 * [("-", late["status"])]
    ours = row("triton", 256, 1, (9, 9))
    assert outcomes(ours, row("flex", 128, 9, (9, 9)))[0][-1] == "not measured: not among the backends"


def test_there_are_no_goals_on_other_hardware_and_for_other_shapes():
    ours = row("triton", 1024, 1, (999, 999))
    other = ours | {"hardware": "NVIDIA H200"}
    assert judge([other]) == "## Goals on an H100\n\nNot applicable: measured on NVIDIA H200."
    assert outcomes(ours | {"D": 64}, ours | {"dtype": "float16"}, ours | {"backend": "torch"}) == []
