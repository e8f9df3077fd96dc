"""The section of the kernel report on the memory-bound kernels, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kernel_summary import table
from pointwise_rows import Row

_LEGEND = """The fused rotary embedding, SwiGLU and diffusion error, which move bytes and compute little. Registers are
given for every target, one number where all agree. Loads and stores: bits that a thread moves at once, the narrowest
of whole tiles of the large tensors (at least 1 % of the least bytes), read off the machine code; at 16 bytes: the share
of the bytes moved that goes at 128 bits or more; narrower or smaller: widths of the tensors below 1 %, and of rows'
ends.

Bytes are counted from the shape and the grid and are no measurement. Least: every input read once, every output
written once. Touched: what the pass touches at all, its own scratch too, by the least: device memory moves this much
if the L2 cache keeps what is read again. Moved: the same if it keeps nothing, each program reading for itself, as the
rotary table for each chunk of heads, though programs of the same tokens are neighbours. Both are of the whole pass:
the mean of the diffusion error counts with its forward."""


def text(rows: Sequence[Row]) -> str:
    """Everything in it is computed: nothing ran on a GPU."""
    broken = [f"- {row.name}: {row.broken_rules}" for row in rows if row.broken_rules]
    parts = [
        "## Memory-bound kernels",
        _LEGEND,
        f"{len(rows)} configurations compiled, {len(broken)} break a rule.\n" + "\n".join(broken),
        _kernels(rows),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _kernels(rows: Sequence[Row]) -> str:
    architectures = dict.fromkeys(row.arch for row in rows)
    head = ("kernel", "shape", "type", "warps", "registers on " + ", ".join(f"sm_{arch}" for arch in architectures),
            "spills", "loads", "stores", "at 16 bytes", "narrower or smaller", "touched / least", "moved / least",
            "least MiB")  # fmt: skip
    groups = dict.fromkeys((row.case, row.dtype) for row in rows)
    return table(head, (_line([row for row in rows if (row.case, row.dtype) == group]) for group in groups))


def _line(rows: Sequence[Row]) -> Sequence[object]:
    """Of one kernel and dtype on every target."""
    of = rows[0]

    def each(value: Callable[[Row], object]) -> str:
        return _each(value(row) for row in rows)

    return (
        of.case, of.shape, of.dtype, each(lambda row: row.warps), each(lambda row: row.registers),
        each(lambda row: row.spills), each(lambda row: row.load_bits), each(lambda row: row.store_bits),
        each(lambda row: f"{row.wide_share:.1%}"), each(_narrow), f"{of.once_by_least:.4f}",
        f"{of.moved_by_least:.4f}", f"{of.least_bytes / 2**20:.1f}",
    )  # fmt: skip


def _narrow(row: Row) -> str:
    ends = f"at ends: {row.narrow_at_ends}" if row.narrow_at_ends else ""
    return ", ".join(filter(None, (row.small_tensors, ends)))


def _each(values: Iterable[object]) -> str:
    """One value for all targets, or one a target; nothing where there is none."""
    words = ["" if value is None else str(value) for value in values]
    return words[0] if len(set(words)) == 1 else " / ".join(words)
