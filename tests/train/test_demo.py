"""The page: what it shows without a browser, and the whole of it in headless Chromium where that is installed."""

import base64
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from image_files import picture, png
from launching import ROOT
from PIL import Image
from safetensors.torch import save_file
from small_models import small_model

from transfusion_fast.data.images import latents_to_pixels
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.sampling.decoder import generate_images
from transfusion_fast.sampling.settings import ImageSettings
from transfusion_fast.training.run_folder import DataDescription, open_model, write_data_description

FORM = {
    "task": "draw", "prompt": "two", "image": None, "steps": 20, "guidance": 3.0, "strength": 0.5, "seed": 7,
    "fresh": False, "sampler": "auto", "count": 4, "temperature": 0.0, "max_tokens": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as train/export.py writes it, of a small model of digit-like images that was not trained."""
    folder = tmp_path_factory.mktemp("demo") / "<b>export"
    folder.mkdir()
    modality = {"dim_latent": 4, "shape": (4, 4), "bound": 1.0}
    model = small_model(modalities=[modality], transformer={"dim": 64, "depth": 2, "heads": 2, "ffn_dim": 64})
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"model_type": "transfusion_fast", "model": model.config.model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(config))
    info = ModalityInfo("image", channels=1, patch_size=2, encoding="pixels")
    write_data_description(folder, DataDescription(ByteTokenizer(), (info,), ((8, 8),), (1.0,), edits=True))
    return folder


@pytest.fixture
def page(export: Path) -> Any:
    demo = runpy.run_path(str(ROOT / "train" / "demo.py"))
    return demo["Page"].of(SimpleNamespace(run=export, checkpoint=None, raw=False, vae=None))


def drawn(export: Path, prompt: str, **settings: Any) -> list[list[int]]:
    """Return the pixels that the Python interface draws with the settings of FORM."""
    model = open_model(export)
    image = ImageSettings(steps=20, guidance=3.0)
    latents = generate_images(model, [[torch.tensor([*prompt.encode()])]], image=image, images_per_prompt=4, **settings)
    return latents_to_pixels(latents.cpu().numpy(), 2)[..., 0].tolist()


def shown(text: str) -> list[list[int]]:
    """Return the pixels of the images in HTML."""
    files = [base64.b64decode(data) for data in re.findall('base64,([^"]+)"', text)]
    return [np.asarray(Image.open(io.BytesIO(file))).tolist() for file in files]


def test_the_page_shows_states_of_the_images_that_the_python_interface_draws(page: Any, export: Path) -> None:
    (waiting, _), *states, (last, seed) = page.answer("session", FORM)
    assert len(states) > 5 and "step 2 of 20" in states[1][0] and "done" in last and seed == 7 and "waiting" in waiting
    assert shown(last) == drawn(export, "two", seed=7)
    (_, first), (_, second) = ([*page.answer("session", FORM | {"fresh": True})][-1] for _ in range(2))
    assert len({7, first, second}) == 3


def test_one_line_is_shown_for_what_cannot_be_answered_and_the_next_is_answered(page: Any, tmp_path: Path) -> None:
    (tmp_path / "<i>.png").write_bytes(b"no image")
    broken = {"task": "caption", "image": str(tmp_path / "<i>.png")}
    for wrong, line in (
        ({"prompt": ""}, "the prompt must have 1 to 4096 tokens, got none; write one"),
        ({"seed": None}, "the seed must be an integer in"),
        ({"seed": -3}, "the seed must be an integer in 0..9223372036854775807, got -3; give another"),
        ({"guidance": float("nan")}, "guidance must be finite, got nan"),
        ({"task": "edit"}, "an image must be given to edit, got none"),
        (broken, "&gt;&lt;i&gt;.png must be a readable image (not an image: must be JPEG, PNG, WEBP, AVIF, "),
    ):
        *_, (text, _) = page.answer("session", FORM | wrong)
        assert line.removeprefix("&gt;") in text and str(tmp_path) not in text and "\n" not in text
    assert page.preview(broken["image"]) == text
    assert "done" in [*page.answer("session", FORM)][-1][0]


def test_stop_ends_the_answer_of_its_own_session(page: Any) -> None:
    answers, waiting = (page.answer(name, FORM | {"steps": 1000, "count": 16}) for name in ("session", "waiting"))
    assert "waiting" in next(answers)[0] and "step" in next(answers)[0] and "waiting" in next(waiting)[0]
    page.stop("another")
    page.stop("waiting")
    assert "step" in next(answers)[0]
    page.stop("session")
    for last, _ in ([*answers][-1], *waiting):
        assert "stopped" in last
    assert page.streams == {}


def test_answers_of_one_session_at_once_do_not_stop_each_other(page: Any) -> None:
    first, second = (page.answer("session", FORM) for _ in range(2))
    next(first), next(second)
    assert ["done" in [*answers][-1][0] for answers in (first, second)] == [True, True]


def test_edits_are_offered_for_runs_on_edits_alone_and_text_alone_writes(page: Any) -> None:
    assert page.tasks == ["draw", "caption", "change", "edit", "write"]
    page.data = SimpleNamespace(modalities=page.data.modalities, edits=False)
    assert page.tasks == ["draw", "caption", "change", "write"]
    page.data = SimpleNamespace(modalities=())
    assert page.tasks == ["write"]


def test_what_the_page_cannot_start_with_gets_one_line(command: Any, export: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")  # restored at the end
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    assert command("demo", "nowhere")[2].startswith("demo: nowhere: is not a run folder")
    assert command("demo", export, "--port", 0)[2] == "demo: --port must be in 1..65535, got 0; give another\n"
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = "demo: package gradio must be installed for this, got none; pip install '.[demo]'\n"
    assert command("demo", export) == (2, "", message)


@pytest.fixture
def chromium() -> str:
    """The path of the browser; skips where anything is missing."""
    path = shutil.which("chromium")
    for found, remedy in (
        (find_spec("gradio"), "gradio: pip install '.[demo]'"),
        (find_spec("playwright"), "playwright: pip install '.[demo-test]'"),
        (path, "Chromium: apt-get install chromium"),
    ):
        if not found:
            pytest.skip(f"needs {remedy}")
    return path


@pytest.fixture
def address(chromium: str, export: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a page that is served, which writes nothing into its folder and ends when it is interrupted."""
    (tmp_path / "here").mkdir()
    command = [sys.executable, str(ROOT / "train" / "demo.py"), str(export)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    place = {"cwd": tmp_path / "here", "env": environment, "text": True}
    with subprocess.Popen(command, **place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as served:
        try:
            line = served.stdout.readline()
            assert re.match("page: http://127.0.0.1:[0-9]+/ ", line), line + served.stdout.read()
            yield line.split()[1]
            served.send_signal(signal.SIGINT)
            assert served.wait(30) == 0
        finally:
            served.kill()
    assert [*(tmp_path / "here").iterdir()] == []


@pytest.mark.slow
def test_the_page_in_a_browser(chromium: str, address: str, export: Path, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    (tmp_path / "good.png").write_bytes(png(picture()))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(25_000)
        expect.set_options(timeout=25_000)
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        answer, prompt = tab.locator("#answer"), tab.locator("#prompt textarea")

        expect(tab.locator("h2")).to_have_text("<b>export")
        tab.get_by_role("button", name="Run").click()
        expect(answer).to_have_text("the prompt must have 1 to 4096 tokens, got none; write one")
        tab.get_by_label("number input for Steps").fill("20")
        prompt.fill("seven")
        prompt.press("Enter")
        expect(answer).to_contain_text("done")
        seed = int(re.search("seed ([0-9]+)", answer.inner_text())[1])
        assert shown(answer.inner_html()) == drawn(export, "seven", seed=seed)

        tab.get_by_text("More").click()
        for setting, most in (("Steps", "250"), ("Images", "16")):
            tab.get_by_label(f"number input for {setting}").fill(most)
        tab.get_by_role("button", name="Run").click()
        expect(answer).to_contain_text("step ")
        other = browser.new_page()
        other.goto(address)
        other.locator("#prompt textarea").fill("two")
        other.get_by_role("button", name="Run").click()
        expect(other.locator("#answer")).to_contain_text("waiting")
        for one in (other, tab):
            one.get_by_role("button", name="Stop").click()
        for one in (answer, other.locator("#answer")):
            expect(one).to_contain_text("stopped")

        tab.get_by_label("New seed each time").uncheck()
        tab.get_by_label("Seed", exact=True).fill("-3")
        tab.get_by_role("button", name="Run").click()
        expect(answer).to_have_text("the seed must be an integer in 0..9223372036854775807, got -3; give another")
        tab.get_by_label("Seed", exact=True).fill("3")

        tab.get_by_label("Caption an image").check()
        expect(tab.locator("#prompt")).to_be_hidden()
        tab.locator("#image input[type=file]").set_input_files(tmp_path / "bad.png")
        expect(answer).to_contain_text("bad.png must be a readable image")
        tab.get_by_label("Clear").click()
        tab.locator("#image input[type=file]").set_input_files(tmp_path / "good.png")
        expect(answer).to_contain_text("as the model sees it")
        tab.get_by_role("button", name="Run").click()
        expect(answer).to_contain_text(re.compile("done|stopped"))
        browser.close()
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
