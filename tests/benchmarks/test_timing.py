"""The module for timing: turns on a CPU, flushed caches on a GPU, memory, and tables of the results."""

import csv

import pytest
import step_bench
import tables
import timing
import torch
import triton

from transfusion_fast import Transfusion
from transfusion_fast.config import ModelConfig

CPU = torch.device("cpu")
E, H, F = 32, 2, 64
DOCUMENTS = [[torch.arange(20), torch.randn(9, 16)], [torch.arange(5)]]


def recorded_step(name, calls):
    def forward():
        calls.append(name)
        return lambda: calls.append(f"{name} backward")

    return forward


def test_steps_on_a_cpu_take_turns_in_either_order():
    calls = []
    steps = {name: recorded_step(name, calls) for name in "ab"}
    timings = timing.time_steps(steps, CPU, seconds=0)
    forth, back = ["a", "a backward", "b", "b backward"], ["b", "b backward", "a", "a backward"]
    assert calls == [*forth, *back, *forth, *back]  # the first turn is not timed
    assert timings["a"]["forward_p20"] <= timings["a"]["forward_p50"] <= timings["a"]["forward_p80"]


def test_a_rehearsed_step_runs_untimed_before_each_timed_run():
    calls = []
    timing.time_steps({"a": recorded_step("a", calls)}, CPU, seconds=0, rehearse=True)
    assert calls.count("a") == 1 + 2 * 3


class FakeGpu:
    """A driver, a device and a clock that advances by one millisecond per event, and logs what happens."""

    def __init__(self):
        self.log, self.now = [], 0.0

    def get_device_interface(self):
        return self

    def get_empty_cache_for_benchmark(self):
        return "cache"

    def clear_cache(self, cache):
        self.log.append("flush")

    def synchronize(self):
        pass

    def Event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.gpu.now += 1
        self.at = self.gpu.now

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.log.append("sleep"))
    return gpu


def test_on_a_gpu_the_cache_is_flushed_and_the_pass_queued_right_before_each_timed_pass(gpu):

    def step():
        gpu.log.append("forward")
        gpu.now += 2
        return lambda: gpu.log.append("backward")

    timings = timing.time_steps({"a": step}, torch.device("cuda"), seconds=1)
    assert list(timings["a"].values()) == [3, 3, 3, 1, 1, 1]
    # The timed repeats are the last ones; do_bench warms up without a flush.
    assert gpu.log[-6 * 20 :] == ["flush", "sleep", "forward", "flush", "sleep", "backward"] * 20


def test_a_slow_step_on_a_gpu_is_timed_three_times(gpu):
    taken = iter(range(1000, 9000, 1000))

    def step():
        gpu.now += next(taken)
        return lambda: None

    found = timing.time_steps({"a": step}, torch.device("cuda"), seconds=0.001)["a"]
    assert found["forward_p50"] == 7001  # of 6001, 7001 and 8001
    assert found["forward_p20"] == pytest.approx(6401) and found["forward_p80"] == pytest.approx(7601)


def test_peaks_are_found_by_the_name_of_the_gpu():
    assert timing.peaks_of("NVIDIA H200") == (989.4, 4800.0)
    assert timing.peaks_of("NVIDIA A100-SXM4-40GB") == (312.0, 1555.0)
    assert timing.peaks_of("NVIDIA GeForce RTX 5090") == (None, None)


def test_a_machine_is_described_by_hardware_versions_and_revision():
    machine = timing.describe_machine(CPU)
    assert machine["hardware"].endswith(" threads")
    assert machine["torch"] == torch.__version__
    assert machine["triton"] == triton.__version__
    assert machine["git"]


def test_the_peak_is_the_most_that_is_allocated_at_one_time():
    megabyte = torch.ones(2**18)

    def step():
        kept = megabyte + 1
        (kept * 2).sum()
        return kept + 3

    kept, peak = timing.allocated_bytes(step, CPU)
    assert kept == pytest.approx(2**20, rel=0.01)
    assert peak == pytest.approx(2 * 2**20, rel=0.01)


def model_and_batch(checkpointing, depth, backend="triton", dtype=torch.float32):
    transformer = {"dim": E, "depth": depth, "heads": H, "ffn_dim": F}
    config = ModelConfig(
        num_text_tokens=256, dim_latent=16, transformer=transformer, backend=backend,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    model = Transfusion(config).to(dtype)
    batch = step_bench.make_batch(model, DOCUMENTS)
    model(batch)  # makes the plans of the batch
    return model, batch


def bytes_of_a_block(checkpointing, **options):
    """Return the bytes for each position."""

    def kept(depth):
        model, batch = model_and_batch(checkpointing, depth, **options)
        return step_bench.kept_bytes(lambda: model(batch).total, CPU), len(batch.tokens)

    (two, length), (one, _) = kept(2), kept(1)
    return (two - one) / length


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2)], ids=str)
def test_a_checkpointed_block_keeps_its_input_and_selectively_what_attention_returns(dtype, size):
    assert bytes_of_a_block("full", dtype=dtype) == size * E
    assert bytes_of_a_block("selective", dtype=dtype) == size * E + size * E + 4 * H, "input, o, log-sum-exp"


def test_a_block_keeps_nothing_twice():
    """A block keeps its input, what lies between attention and MLP, the outputs of two norms, the projection (for v,
    which lies in it), the rotated q and k, o, the MLP's projection and product, and some vectors."""
    vectors = 4 * (H + 4)  # the log-sum-exp, and statistics of two norms
    tensors = 4 * (2 * E + 2 * E + 3 * E + 2 * E + E + 2 * F + F)
    norms = 2 * 2 * 4 * E  # torch's norm on a CPU is made of smaller operations that keep results of their own
    kept = bytes_of_a_block("none")
    assert tensors <= kept <= tensors + vectors + norms


FORWARD = ("forward_p20", "forward_p50", "forward_p80")
ROWS = [
    {"name": "a", "backend": "ours", **dict(zip(FORWARD, (1.0, 1234.5678, 3.14159), strict=True)), "count": 123456789}
    | {"x": None, "status": "ok"},
    {"name": "b", "backend": "ours", **dict.fromkeys(FORWARD, "not measured"), "count": None, "x": 0.5}
    | {"status": "not measured: too slow"},
]


def test_a_csv_file_holds_floats_to_six_digits_and_integers_in_full(tmp_path):
    tables.write_csv(ROWS, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == ROWS[0] | {
        "forward_p20": "1", "forward_p50": "1234.57", "forward_p80": "3.14159", "count": "123456789", "x": "",
    }  # fmt: skip
    assert second["forward_p50"] == "not measured"


def test_a_markdown_table_shows_three_digits_and_a_dash_for_what_was_not_measured():
    columns = {"name": "{name}", "forward": tables.spread("forward"), "x": "{x:.1%}"}
    assert tables.markdown_table(ROWS, columns).splitlines() == [
        "| name | forward | x |",
        "| --- | --- | --- |",
        "| a | 1235 (1-3.14) | - |",
        "| b | - (---) | 50.0% |",
    ]
    assert tables.list_unmeasured(ROWS, "{name}") == "- ours, b: not measured: too slow"
