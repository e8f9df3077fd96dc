"""The goals of the Triton kernels on an H100, judged on measured rows: bf16, D = 128, TFLOP/s by exact area.

1. 2.5 times FlexAttention's speed, forward and backward together, in every row.
2. Where documents have at most 512 positions on average: the rates of FlashAttention-3's varlen causal kernel on the
   same documents, measured in the same run. (Published: 219 forward at a total of 2k.)
3. Where they have at least 1,024: the rates that MagiAttention publishes for its FFA kernel under a varlen block-causal
   mask, from a total of 8k. Documents have at most a quarter of the total there, taken as an eighth on average: a row
   is held to the largest total of which its mean length is an eighth or more.
"""

from collections.abc import Iterator, Sequence

from tables import Row, markdown_table
from timing import NOT_MEASURED, PASSES, both_ms

# TFLOP/s of FFA, forward and backward, by the mean length from which they hold: at 8k and at 32k in all.
_FFA = {1024: (528.0, 314.0), 4096: (572.0, 363.0)}
SHAPE = ("mix", "T", "H", "G", "D", "dtype")
"""The columns that name a shape."""

_FLEX_FACTOR = 2.5
_FA3 = "flash_attn_interface"
_NOTE = """\
FFA's rates are those that MagiAttention publishes for totals of 8k and 32k positions. A row must reach the rate of the
largest total of which its mean length is an eighth or more. FA3's rates are measured in the same run, by the area of
its causal mask."""
_COLUMNS = {
    "mix": "{mix}", "T": "{T}", "goal": "{goal}", "wanted": "{wanted:.3g}", "reached": "{reached:.3g}",
    "outcome": "{outcome}",
}  # fmt: skip


def judge(rows: Sequence[Row]) -> str:
    """Return a section of the report: a table of goals on an H100, and why there is none on other hardware."""
    hardware, title = rows[0]["hardware"], "## Goals on an H100"
    if "H100" not in hardware:
        return f"{title}\n\nNot applicable: measured on {hardware}."
    found = [goal for row in rows if _is_judged(row) for goal in _goals(row, rows)]
    return "\n\n".join([title, markdown_table(found, _COLUMNS), _NOTE] if found else [title, "No row has a goal."])


def _is_judged(row: Row) -> bool:
    return row["backend"] == "triton" and (row["dtype"], row["D"]) == ("bfloat16", 128)


def _goals(row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    """Return the goals of a row of ours, with `wanted` and `reached`, or with the reason for which it is not judged."""
    others = {other["backend"]: other for other in rows if all(other[name] == row[name] for name in SHAPE)}
    flex = others.get("flex", {"status": f"{NOT_MEASURED}: not among the backends"})
    speed = both_ms(flex) / both_ms(row) if _is_measured(flex) and _is_measured(row) else None
    yield _goal(row, f"{_FLEX_FACTOR} x FlexAttention", _FLEX_FACTOR, speed, flex)
    if row["mean_length"] <= 512:
        fa3 = others.get("flash_varlen_causal", {})
        if fa3.get("kernel") != _FA3:
            fa3 = {"status": f"{NOT_MEASURED}: no rate of {_FA3}"}
        wanted = [fa3.get(f"{which}_tflops") for which in PASSES]
        source, name = fa3, "FA3, varlen causal"
    elif row["mean_length"] >= min(_FFA):
        wanted = list(_FFA[max(length for length in _FFA if length <= row["mean_length"])])
        source, name = row, "FFA, varlen block-causal, published"
    else:
        return
    for which, rate in zip(PASSES, wanted, strict=True):
        reached = row[f"{which}_tflops"] if _is_measured(row) else None
        yield _goal(row, f"{name}: {which}, TFLOP/s", rate, reached, source)


def _goal(row: Row, goal: str, wanted: float | None, reached: float | None, other: Row) -> Row:
    unmeasured = next((one["status"] for one in (row, other) if not _is_measured(one)), None)
    outcome = unmeasured or ("pass" if reached >= wanted else "fail")
    return {**row, "goal": goal, "wanted": wanted, "reached": reached, "outcome": outcome}


def _is_measured(row: Row) -> bool:
    return row["status"].startswith("ok")
