"""A run on text alone, from raw lines to words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from launching import ROOT, metrics, train

from transfusion_fast.data.tokenizer import train_bpe
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.sources.text import TextSource


def test_prepared_text_is_trained_on_and_gone_on_with(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} plus {i} is {2 * i}. " * 5}) for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = train_bpe([json.loads(line)["text"] for line in lines], 280)
    source = TextSource.of([tmp_path / "sums.jsonl"])
    build(Recipe(source, Encoder(tokenizer, 128)), tmp_path / "data")
    train(2, tmp_path / "data", tmp_path / "run", "model.dim_latent=[]", "model.num_text_tokens=280")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["text_loss"] < rows[0]["text_loss"] and rows[-1]["diffusion_loss"] == 0
    shutil.rmtree(tmp_path / "data")  # the run has what it needs
    command = [sys.executable, str(ROOT / "train" / "sample.py"), str(tmp_path / "run")]
    done = subprocess.run([*command, "--text", "7 plus", "--max-tokens", "4"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("7 plus"), done.stderr
    refused = subprocess.run([*command, "--prompt", "seven"], capture_output=True, text=True)
    assert refused.returncode == 2 and "need a run on images" in refused.stderr and "Traceback" not in refused.stderr
