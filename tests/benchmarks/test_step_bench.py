"""The step benchmark: what it trains, how it counts, and that it times nothing that computes something else."""

import csv

import mixes
import pytest
import step_bench
import torch
from step_bench import Variant
from timing import COLUMNS

from transfusion_fast import Transfusion
from transfusion_fast.config import ModelConfig, TransformerConfig
from transfusion_fast.errors import InputError
from transfusion_fast.model import ops

CPU = torch.device("cpu")


def test_ragged_documents_are_24_of_4_to_160_tokens_every_other_one_with_an_image():
    documents = step_bench.ragged_documents()
    assert len(documents) == 24
    assert all(4 <= len(document[0]) <= 160 for document in documents)
    assert [len(document) for document in documents] == [2, 1] * 12
    assert {tuple(piece.shape) for document in documents for piece in document[1:]} == {(64, 16)}


@pytest.mark.parametrize("mix", mixes.NAMES)
def test_the_documents_of_a_mix_are_packed_as_the_mix_has_them(mix):
    model = Transfusion(
        ModelConfig(num_text_tokens=256, dim_latent=16, transformer={"dim": 32, "depth": 1, "heads": 1})
    )
    batch = step_bench.make_batch(model, step_bench.mix_documents(mix, 2048))
    lengths, spans = mixes.generate(mix, 2048)
    assert batch.layout.image_spans.tolist() == [list(span) for span in sorted(spans)]
    assert batch.layout.document_offsets.diff().tolist() == lengths


def test_flops_count_each_use_of_a_weight_and_each_visible_pair():
    transformer = {"dim": 32, "depth": 3, "heads": 2, "ffn_dim": 64}
    model = Transfusion(ModelConfig(num_text_tokens=256, dim_latent=16, transformer=transformer))
    batch = step_bench.make_batch(model, [[torch.arange(3), torch.randn(2, 16)]])
    # <bos> a b c <boi> p p <eoi> <eos>: five labels, and of 9 positions the first patch sees the second.
    weights = 9 * 3 * (4 * 32 * 32 + 3 * 32 * 64) + 5 * 260 * 32 + 2 * 2 * 16 * 32
    assert step_bench.model_flops(model, batch) == 6 * weights + 12 * 3 * 32 * (45 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_follow_fp32_masters_that_adamw_moves(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 5, bias=False).to(dtype)
    model.weight.data *= 1e-3  # so that AdamW's steps show in half precision
    master = model.weight.detach().float().requires_grad_()
    optimizer = torch.optim.AdamW([master], lr=1e-5, fused=True)
    gradient = torch.zeros(())
    step = step_bench.train_step(model, lambda: gradient.item() * model.weight.float().sum())
    for _ in range(20):
        gradient += 1
        step()()
        master.grad = torch.full_like(master, gradient.item())
        optimizer.step()
        assert model.weight.grad is None
        assert torch.equal(model.weight, master.to(dtype))


def test_nothing_is_timed_where_a_backends_losses_are_not_the_references(monkeypatch):
    monkeypatch.setitem(step_bench.TRANSFORMERS, "mini", TransformerConfig(dim=32, depth=1, heads=2))
    documents = step_bench.ragged_documents(2)
    step_bench.check_losses("mini", documents, CPU, "torch")
    wrong = ops.IMPLEMENTATIONS["torch"] | {"swiglu": lambda gate, up: gate.chunk(2, dim=-1)[0]}
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "torch", wrong)
    with pytest.raises(InputError, match="losses of fp32 torch must be the reference's to 1e-05, they differ by"):
        step_bench.check_losses("mini", documents, CPU, "torch")


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(step_bench.sys.modules, "transfusion_pytorch", None)
    with pytest.raises(InputError, match="--peer transfusion-pytorch needs that package"):
        step_bench.prepare_peer("mini", [], CPU)


def test_a_row_counts_tokens_and_flops_by_the_time_of_both_passes():
    facts = {
        "name": "bf16 torch", "preset": "mini", "dtype": "bf16", "parameters": 9_000_000, "active": 5_000_000,
        "tokens": 2000, "flops": 40 * 10**9, "peak_bytes": 2**21, "kept_bytes": 8000, "compile_s": None,
    }  # fmt: skip
    times = dict(zip(COLUMNS, (90, 100, 110, 280, 300, 320), strict=True))
    row = step_bench.make_row(facts, times, {"bf16": 1000.0, "fp32": 200.0}, {"hardware": "a CPU"})
    assert row["tokens_per_s"] == 5000
    assert (row["weight_gflops"], row["share_of_matmul"], row["share_of_fp32_matmul"]) == (150, 0.15, 0.75)
    assert (row["mfu"], row["peak_mib"], row["kept_bytes_per_token"]) == (0.1, 2, 4)
    assert (row["forward_p20_ms"], row["backward_p80_ms"]) == (90, 320)
    on_gpu = step_bench.make_row(facts, times, {"bf16": 1000.0, "fp32": 200.0}, {"hardware": "NVIDIA H200"})
    assert on_gpu["mfu"] == pytest.approx(0.1 / 989.4)


def test_every_step_and_the_matrix_products_are_timed_in_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step_bench.TRANSFORMERS, "mini", TransformerConfig(dim=32, depth=1, heads=2))
    monkeypatch.setattr(step_bench, "ragged_documents", lambda: [[torch.arange(9)], [torch.randn(4, 16)]])
    monkeypatch.setattr(step_bench, "variants", lambda *names: [Variant("fp32", "plain"), Variant("fp32", "torch")])
    assert step_bench.main(["--out", str(tmp_path), "--device", "cpu", "--dtypes", "fp32", "--seconds", "0.1"]) == 0
    with (tmp_path / "step.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["fp32 plain", "fp32 torch"]
    assert all(float(row["tokens_per_s"]) > 0 and float(row["matmul_gflops"]) > 0 for row in rows)
    report = (tmp_path / "step.md").read_text()
    assert "| fp32 torch |" in report and "of shared weights: not measured" in report
    assert (tmp_path / "step.png").stat().st_size > 0


def test_separate_weights_are_judged_by_the_step_of_shared_weights_in_each_dtype():
    def rows(separate, adaln=20.0):
        speeds = {"fp32 torch, compiled": 1.0, "fp32 torch, adaLN-zero": adaln, "fp32 torch": 46.0} | separate
        return [{"name": name, "tokens_per_s": speed, "times_shared": None} for name, speed in speeds.items()]

    for speed, told in ((40.0, "1.150, pass"), (39.9, "1.153, fail")):
        found = rows({"fp32 torch, separate weights": speed})
        rule = "- fp32: separate weights take at most 1.15 times the step of shared weights: "
        assert step_bench.compare_blocks(found, "fp32", "torch") == rule + told
        assert [row["times_shared"] for row in found] == [None, 2.3, 1, 46 / speed]
        assert step_bench.compare_blocks(found, "bf16", "torch").endswith(": not measured")
    failed = [*rows({}), {"name": "fp32 torch, separate weights", "status": "not measured: out of memory"}]
    assert step_bench.compare_blocks(failed, "fp32", "torch").endswith(": not measured")


def test_other_blocks_have_the_sizes_and_the_active_parameters_of_the_shared_ones(monkeypatch):
    monkeypatch.setitem(step_bench.TRANSFORMERS, "mini", TransformerConfig(dim=32, depth=1, heads=2))
    facts = {}
    for variant in (one for one in step_bench.variants("fp32", "torch") if not one.compiled):
        facts[str(variant)] = step_bench._prepare(variant, "mini", step_bench.ragged_documents(2), CPU)[1]
    shared, separate = facts["fp32 torch"], facts["fp32 torch, separate weights"]
    assert (
        shared["active"]
        == shared["parameters"]
        < separate["parameters"]
        < facts["fp32 torch, adaLN-zero"]["active"] * 2
    )
    assert len({(row["active"], row["flops"], row["tokens"]) for row in facts.values()}) == 1


def test_running_out_of_memory_is_the_result_of_a_step(tmp_path, monkeypatch):
    monkeypatch.setitem(step_bench.TRANSFORMERS, "mini", TransformerConfig(dim=32, depth=1, heads=2))
    monkeypatch.setattr(step_bench, "ragged_documents", lambda: [[torch.arange(9)], [torch.randn(4, 16)]])
    monkeypatch.setattr(step_bench, "variants", lambda *names: [Variant("fp32", "plain"), Variant("fp32", "torch")])
    prepare = step_bench._prepare

    def too_large(variant, *arguments):
        if variant.backend == "plain":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(variant, *arguments)

    monkeypatch.setattr(step_bench, "_prepare", too_large)
    assert step_bench.main(["--out", str(tmp_path), "--device", "cpu", "--dtypes", "fp32", "--seconds", "0.1"]) == 0
    report = (tmp_path / "step.md").read_text()
    assert "- fp32 plain: not measured: out of memory" in report and "| fp32 torch |" in report


def test_losses_are_compared_on_few_positions(monkeypatch):
    monkeypatch.setitem(step_bench.TRANSFORMERS, "mini", TransformerConfig(dim=32, depth=1, heads=2))
    lengths, make = [], step_bench.make_batch
    monkeypatch.setattr(
        step_bench, "make_batch", lambda *given: lengths.append(len(make(*given).tokens)) or make(*given)
    )
    step_bench.check_losses("mini", step_bench.mix_documents("mixed", 4096), CPU, "torch")
    assert min(lengths) > 300 and max(lengths) < 1200
