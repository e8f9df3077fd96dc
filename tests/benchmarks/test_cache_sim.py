"""The simulated L2 cache: counts by hand, and what the launch order of a layout's tiles gains by it."""

from dataclasses import replace

import mixes
import pytest
from cache_sim import GPUS, least_bytes, longest_first, main, published, simulate

from transfusion_fast.kernels.attention_configs import KERNELS
from transfusion_fast.kernels.layout import AttentionLayout

H100 = GPUS["H100 SXM"]
COLUMN = 2 * 128 * 2  # bytes of a position of two tensors


def costs(layout, kernel, heads=(16, 16), gpu=H100, **columns):
    """Return the costs of a kernel at D = 128 on an H100, some columns of its compiled rows replaced."""
    return simulate(layout, [row | columns for row in published(kernel, 90, 128)], gpu, *heads)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_heads", [16, 4])
def test_a_large_cache_moves_each_byte_once_and_none_moves_what_programs_load(kernel, kv_heads):
    layout = AttentionLayout.from_spans([320, 30], [])
    once = least_bytes(kernel, 350, 16, kv_heads, 128)
    assert costs(layout, kernel, (16, kv_heads)).moved_mib * 2**20 == once
    # Tiles of 128, 128 and 64 positions load these columns for each query head, and the short document its own.
    by_keys = kernel == "backward_dkdv"
    loaded = 16 * ((320 + 192 + 64 if by_keys else 128 + 256 + 320) + 30)
    nothing = costs(layout, kernel, (16, kv_heads), H100._replace(cache_mib=0))
    assert nothing.moved_mib * 2**20 == once + (loaded - 350 * (16 if by_keys else kv_heads)) * COLUMN


def test_columns_that_were_used_longest_ago_are_lost():
    """On one multiprocessor, two documents of four tiles, with room for the columns of one and the rows of two."""
    together = AttentionLayout.from_spans([512, 512], [(0, 512), (512, 512)])
    in_turn = replace(together, query_tiles=together.query_tiles[[0, 4, 1, 5, 2, 6, 3, 7]])
    gpu = H100._replace(multiprocessors=1, cache_mib=769 * COLUMN / 0.8 / 2**20)
    kept, lost = (costs(layout, "forward", (1, 1), gpu).moved_mib * 2**20 for layout in (together, in_turn))
    assert kept == least_bytes("forward", 1024, 1, 1, 128)
    assert lost == kept + (8 - 2) * 512 * COLUMN


@pytest.mark.parametrize(("multiprocessors", "blocks", "expected"), [(1, 1, 100), (2, 1, 60), (1, 2, 60), (1, 3, 90)])
def test_programs_share_multiprocessors_and_short_tiles_wait_for_tall_ones(multiprocessors, blocks, expected):
    """Two tiles of two steps, then one of one step, each of 10 cycles for either unit."""
    layout = AttentionLayout.from_spans([256, 30], [(0, 256)])
    units = {f"{loop}_{unit}_cycles": 10 for loop in ("full", "partial") for unit in ("matrix", "issue", "mufu")}
    gpu = H100._replace(multiprocessors=multiprocessors, clock_ghz=1e-3)
    found = costs(layout, "forward", (1, 1), gpu, blocks_per_multiprocessor=blocks, **units)
    assert found.compute_us == pytest.approx(expected)


def test_a_program_of_keys_visits_its_columns_for_each_query_head():
    layout, gpu = AttentionLayout.from_spans([100], []), H100._replace(multiprocessors=1)
    one, four = (costs(layout, "backward_dkdv", (heads, 1), gpu).compute_us for heads in (1, 4))
    assert four == pytest.approx(4 * one)


@pytest.mark.parametrize(
    ("mix", "T", "most"),
    [("text", 16384, (134, 174, 234)), ("text", 65536, (474, 614, 823)), ("mixed", 131072, (938, 1296, 1463))],
)
def test_the_launch_order_keeps_the_bound_near_the_time_to_compute(mix, T, most):
    """With the longest tiles first the bounds are 210, 254 and 249; 851, 1030 and 991; 1419, 1778 and 1744 us."""
    layout = mixes.sample(mix, T)
    for kernel, limit in zip(KERNELS, most, strict=True):
        assert costs(layout, kernel).bound_us <= limit


@pytest.mark.parametrize("heads", [(16, 16), (16, 4)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_documents_of_many_tiles_are_computed_at_most_2_percent_longer_than_longest_first(kernel, heads):
    layout = mixes.sample("interleaved", 16384)
    assert costs(layout, kernel, heads).bound_us <= 1.02 * costs(longest_first(layout), kernel, heads).bound_us


def test_the_report_calls_itself_a_simulation(tmp_path):
    assert main(["--out", str(tmp_path), "--mixes", "pairs", "tiny", "--tokens", "2048"]) == 0
    assert "A simulation, not a measurement" in (tmp_path / "cache_sim.md").read_text()
    assert len((tmp_path / "cache_sim.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
