"""The first hour on a GPU: what a stage may need, and that stages stop neither each other nor themselves."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import attn_bench
import gpu_day
import mixes
import pytest
from gpu_day import Day, Stage

ROOT = Path(__file__).resolve().parents[2]
CALLED = [
    path for folder in ("kernels", "transfusion_fast/model", "benchmarks") for path in (ROOT / folder).glob("*.py")
]
# Public names of torch 2.13 that 2.11 does not have, in the modules that are used here.
NEWER_THAN_2_11 = {
    "thread_safe_generator", "LinearCrossEntropyLoss", "LinearCrossEntropyOptions", "linear_cross_entropy",
    "const_data_ptr", "enforce_grad_layout_policy", "CacheInfo", "get_default_backend", "set_default_backend",
    "caching_allocator_disabled", "current_solver_handle", "varlen_attn_out", "swap_in_optimizer_params_and_state",
    "all_gather_single", "record_comm", "reduce_scatter_single",
}  # fmt: skip
ABSENT = (
    "deepspeed",
    "webdataset",
    "pydantic",
    "fsspec",
    "tokenizers",
    "diffusers",
    "sklearn",
    "pyarrow",
    "tqdm",
)
BLOCKED = f"""
import sys

sys.modules.update(dict.fromkeys({ABSENT}))  # whose import then fails
import torch
import attn_bench, fake_driver, gpu_day, kernel_check, pointwise_bench, step_bench
import attention_cases, fast_interpreter, pointwise_cases
from transfusion_fast import ModelConfig, Transfusion
from transfusion_fast.config_reading import load_config
from transfusion_fast.errors import InputError

fast_interpreter.search_the_language_once()
assert kernel_check.check("cpu", [32], ["fp32"], compare=True)
config = ModelConfig(dim_latent=8, transformer=dict(dim=64, depth=1, heads=2), backend="torch")
assert config.dim_latent == (8,) and config.transformer.head_dim == 32
several = ModelConfig(modalities=[dict(dims=1), dict(dim_latent=8)], positions="axial")
assert [(m.dims, m.dim_latent, m.positions) for m in several.modalities] == [(1, 4, "axial"), (2, 8, "axial")]
assert ModelConfig(preset="1.4b").transformer.dim == 2048
model = Transfusion(config)
model([[torch.arange(9), torch.randn(12, 8)]]).backward()
assert all(p.grad is not None for p in model.parameters())
for wrong in ("ModelConfig(dept=3)", "ModelConfig(transformer=dict(dim=64, heads=5))", "load_config(None)"):
    try:
        eval(wrong)
    except ValueError as error:
        print(error)
"""


def test_kernels_benchmarks_and_the_model_run_where_only_torch_and_triton_are_certain():
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "benchmarks", "tests"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "pydantic is not installed: types and ranges of settings are not checked" in done.stderr
    *_, unknown, heads, missing = done.stdout.splitlines()
    assert "got 'dept'" in unknown and "heads must divide dim" in heads
    assert "package pydantic must be there to read defaults, got none" in missing


def test_nothing_that_a_gpu_machine_runs_is_newer_than_torch_2_11():
    def names(path):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                yield node.attr
            elif isinstance(node, ast.ImportFrom):
                yield from (alias.name for alias in node.names)

    found = {(path.name, name) for path in CALLED for name in names(path) if name in NEWER_THAN_2_11}
    assert found == set()


def stage(name, *commands, **settings):
    return Stage(name, commands, commands, 0, 0, **settings)


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next_and_only_those_are_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "START", 0)
    ran, day = tmp_path / "ran", Day(tmp_path, rehearse=False)
    script = tmp_path / "append.sh"
    script.write_text(f"echo once >> {ran}")
    (tmp_path / "unfinished.sh").write_text(f"exit {gpu_day.UNFINISHED}")
    hanging = tmp_path / "hanging.sh"
    hanging.write_text(f"(sleep 1; echo survived >> {ran}) & wait")
    chosen = [
        stage("broken", "false"),
        stage("unfinished", f"sh {tmp_path / 'unfinished.sh'}"),
        stage("hanging", f"sh {hanging}", limit=0.2),
        stage("absent", "true", needs=("no_such_package",)),
        stage("tool", "true", tools=("no-such-tool",)),
        stage("good", f"sh {script}"),
    ]
    for _ in range(2):
        for one in chosen:
            day.run(one, 1000)
        day.write(chosen)
        day = Day(tmp_path, rehearse=False)
    outcomes = [day.records[one.name]["outcome"] for one in chosen]
    assert outcomes.pop(1) == "ran out of time; run the same command again to go on"
    assert outcomes[:2] == ["failed with exit status 1", "stopped after its limit of 0 s"]
    assert outcomes[2:4] == ["did not run: not installed: no_such_package", "did not run: not installed: no-such-tool"]
    time.sleep(1)  # longer than a process of a stopped stage would take
    assert outcomes[4] == "ok" and ran.read_text() == "once\n"
    page = (tmp_path / "gpu_day.md").read_text()
    assert all(outcome in page for outcome in outcomes)


def test_a_stage_that_passed_in_a_rehearsal_or_before_the_code_changed_runs_again(tmp_path, monkeypatch):
    ran, script = tmp_path / "ran", tmp_path / "append.sh"
    script.write_text(f"echo once >> {ran}")
    monkeypatch.setattr(gpu_day, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    for rehearse, code in ((True, "1"), (False, "1"), (False, "2"), (False, "2")):
        (tmp_path / "kernels" / "code.py").write_text(code)
        day = Day(tmp_path, rehearse)
        day.run(stage("one", f"sh {script}"), 1000)
        day.write([])
    assert ran.read_text() == "once\n" * 3


def test_a_test_process_that_dies_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # importing them takes most of the time
    (tmp_path / "test_it.py").write_text("import os, pytest\npytestmark = pytest.mark.gpu\n"
                                         "def test_dies(): os.abort()\ndef test_passes(): pass\n")  # fmt: skip
    assert gpu_day.run_tests(str(tmp_path / "test_it.py"), 2) == 1


def test_no_stage_starts_that_might_not_end_in_the_time_that_is_left(tmp_path):
    day, one = Day(tmp_path, rehearse=False), stage("one", "true")
    day.run(one, left=10)
    assert day.records["one"]["outcome"].startswith("did not start: 0.2 minutes were left")
    day.run(one, left=1000)
    assert day.records["one"]["outcome"] == "ok"


@pytest.mark.parametrize("one", gpu_day.stages(16), ids=lambda one: one.name)
def test_every_stage_is_expected_to_end_within_its_limit_of_less_than_8_minutes(one):
    assert one.estimate() < one.limit < 480


def test_attention_is_asked_for_the_six_mixes_and_then_for_documents_from_short_to_long(monkeypatch):
    asked = []
    monkeypatch.setattr(attn_bench.timing, "run_benchmark", lambda name, options, measure: asked.append(options) or 0)
    for command in (command for one in gpu_day.stages(16) for command in one.commands if "attn_bench" in command):
        attn_bench.main(command.split()[2:])
    packs = [attn_bench._packs(options, gpu=True) for options in asked]
    short = [(mix, length) for mix in mixes.BY_MEAN for length in (16384, 65536)]
    assert packs == [[(mix, 16384) for mix in mixes.NAMES], short]
