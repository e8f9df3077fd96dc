"""A page for the browser on which a trained model draws, captions and writes; shown on this machine alone.

python train/demo.py RUN            # then open the address that it prints
"""

import argparse
import html
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from transfusion_fast.data.autoencoder import Autoencoder
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.prepare.given_images import read_image
from transfusion_fast.prepare.preview import Picture, fragment
from transfusion_fast.prepare.sources.base import MAX_BYTES
from transfusion_fast.sampling.pictures import open_autoencoder
from transfusion_fast.sampling.settings import ImageSettings, Sampler, TextSettings
from transfusion_fast.sampling.streaming import MAX_IMAGES, Answer, Request, Stream, Streamer, Task, shown_pixels
from transfusion_fast.sampling.subject import Subject
from transfusion_fast.training.run_folder import DataDescription, open_model, read_data_description, read_settings

STYLE = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: auto !important }
#answer { min-height: 26rem; padding: 1rem; border: 1px solid var(--border-color-primary); border-radius: 8px }
#answer .text { white-space: pre-wrap; font-size: 1.1rem; line-height: 1.7; overflow-wrap: anywhere }
figure { display: inline-block; margin: .3rem; vertical-align: middle }
figure img { image-rendering: pixelated; min-width: 112px; max-width: 100%; border-radius: 6px }
#answer .status { opacity: .65; margin-top: .6rem }
#answer .error { color: #b91c1c; font-weight: 600 }
"""
TASKS: dict[Task, tuple[str, str]] = {
    "draw": ("Draw", "What to draw"),
    "caption": ("Caption an image", ""),
    "change": ("Redraw an image", "What the image becomes"),
    "edit": ("Edit an image", "What to change in the image"),
    "write": ("Write", "The beginning of a text"),
}
"""The name of each task, and what its prompt is."""
GIVEN = ("caption", "change", "edit")  # tasks that begin with an image
MAX_WAITING = 16
"""Most requests that have reached the streamer, where Stop finds them: each takes one of gradio's 40 threads."""


def main() -> int:
    """Serve the page until it is interrupted; return the exit code."""
    options = _parser().parse_args()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing leaves this machine
    try:
        if options.port is not None and not 1 <= options.port <= 65535:
            raise InputError(f"--port must be in 1..65535, got {options.port}; give another")
        gradio, page = optional_module("gradio", "demo"), Page.of(options)
        _serve(gradio, page.blocks(gradio), options)
    except (InputError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    for session in [*page.streams]:
        page.stop(session)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="output folder of train/pretrain.py or train/export.py")
    add("--vae", type=Path, metavar="FOLDER", help="autoencoder of the data, for a run on latents")
    add("--checkpoint", help="name of a checkpoint, such as step-00000500 (default: the latest)")
    add("--raw", action="store_true", help="use the weights of the last step, not their average")
    add("--host", default="127.0.0.1", help="address to listen on; others than the default let other machines in")
    add("--port", type=int, help="port to listen on (default: the first free one from 7860 on)")
    return parser


def _serve(gradio: Any, blocks: Any, options: argparse.Namespace) -> None:
    _, address, _ = blocks.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        css=STYLE,
        theme=gradio.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    print(f"page: {address} (end with Ctrl-C)", flush=True)
    blocks.block_thread()


@dataclass
class Page:
    """The page of one model."""

    name: str
    data: DataDescription
    streamer: Streamer
    vae: Autoencoder | None
    examples: tuple[str, ...] = ()
    streams: dict[str, Stream] = field(default_factory=dict)
    """The answers that are being made, by the session of the browser that asked for them."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """Open the model that the command line names."""
        data, settings = read_data_description(options.run), read_settings(options.run, options.checkpoint)
        vae = open_autoencoder(options.vae, data.modalities, "--vae", str(options.run))
        model = open_model(options.run, options.checkpoint, raw=options.raw)
        streamer = Streamer(Subject(model, data.tokenizer, data.modalities, vae))
        return cls(options.run.resolve().name, data, streamer, vae, settings.train.sample_prompts if settings else ())

    @property
    def tasks(self) -> list[Task]:
        """The tasks that the model can do."""
        if not self.data.modalities:
            return ["write"]
        return [task for task in TASKS if task != "edit" or self.data.edits]

    def blocks(self, gr: Any) -> Any:
        """Return the page in gradio's components."""
        first, *others = self.tasks
        with gr.Blocks(title=self.name, analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.HTML(f"<h2>{html.escape(self.name)}</h2>{self._described()}")
            names = [(TASKS[task][0], task) for task in self.tasks]
            task = gr.Radio(names, value=first, show_label=False, visible=bool(others), elem_id="task")
            with gr.Row():
                with gr.Column(scale=2):
                    prompt = gr.Textbox(label=TASKS[first][1], max_lines=8, autofocus=True, elem_id="prompt")
                    image = gr.File(label="An image", type="filepath", visible=False, height=120, elem_id="image")
                    with gr.Column(visible=bool(self.examples)) as examples:
                        if self.examples:
                            gr.Examples([[one] for one in self.examples], prompt, label="Prompts of its training")
                    with gr.Row():
                        run = gr.Button("Run", variant="primary")
                        stop = gr.Button("Stop")
                    settings = self._settings(gr)
                with gr.Column(scale=3):
                    shown = gr.HTML(elem_id="answer")
            form = {"task": task, "prompt": prompt, "image": image, **settings}
            self._connect(gr, page, form, examples, run, stop, shown)
        return page

    def _described(self) -> str:
        model = self.streamer.subject.model
        return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, on {model.device.type}"

    def _settings(self, gr: Any) -> dict[str, Any]:
        """Return the inputs for settings by the names that `_request` reads."""
        draws, whole, inputs = bool(self.data.modalities), {"step": 1, "precision": 0}, {}
        with gr.Group(visible=draws):
            inputs["steps"] = gr.Slider(1, 250, 50, **whole, label="Steps")
            guidance = "Guidance: how closely images follow the prompt"
            inputs["guidance"] = gr.Slider(1, 12, 3, step=0.1, label=guidance)
            changed = "Strength: how much of the image changes"
            inputs["strength"] = gr.Slider(0.05, 1, 0.6, step=0.05, label=changed, visible=False)
        with gr.Accordion("More", open=False):
            with gr.Row():
                inputs["seed"] = gr.Number(0, label="Seed", precision=0)
                inputs["fresh"] = gr.Checkbox(True, label="New seed each time")
            with gr.Group(visible=draws):
                inputs["sampler"] = gr.Dropdown(self._samplers(), value="auto", label="Sampler")
                inputs["count"] = gr.Slider(1, MAX_IMAGES, 4 if draws else 1, **whole, label="Images")
            likeliest = "Temperature of text; 0 takes the likeliest tokens"
            inputs["temperature"] = gr.Slider(0, 2, 0, step=0.05, label=likeliest)
            inputs["max_tokens"] = gr.Slider(1, 1024, 64, **whole, label="Most new tokens of text")
        return inputs

    def _connect(
        self, gr: Any, page: Any, form: dict[str, Any], examples: Any, run: Any, stop: Any, shown: Any
    ) -> None:
        # By the annotation with its own class, gradio knows that it has to give the request.
        def answer(request: gr.Request, *inputs: Any) -> Iterator[tuple[str, int]]:
            yield from self.answer(request.session_hash, dict(zip(form, inputs, strict=True)))

        def end(request: gr.Request) -> None:
            self.stop(request.session_hash)

        def choose(task: Task) -> list[Any]:
            prompt = gr.update(visible=task != "caption", label=TASKS[task][1])
            shown_examples = gr.update(visible=task != "caption" and bool(self.examples))
            return [prompt, gr.update(visible=task in GIVEN), gr.update(visible=task == "change"), shown_examples]

        triggers, outputs = [run.click, form["prompt"].submit], [shown, form["seed"]]
        gr.on(triggers, answer, [*form.values()], outputs, show_progress="hidden", concurrency_limit=MAX_WAITING)
        stop.click(end, queue=False)
        page.unload(end)  # when the browser leaves the page
        chosen = [*(form[name] for name in ("prompt", "image", "strength")), examples]
        form["task"].change(choose, form["task"], chosen, show_progress="hidden", queue=False)
        form["image"].change(self.preview, form["image"], shown, show_progress="hidden")

    def _samplers(self) -> list[str]:
        deterministic = ["auto", "euler", "heun", "dpm++"]
        return deterministic if self.streamer.subject.model.diffusion.is_flow else [*get_args(Sampler)]

    def answer(self, session: str, form: dict[str, Any]) -> Iterator[tuple[str, int]]:
        """Yield the HTML of an answer while it is made, and its seed."""
        seed, begun = secrets.randbelow(1 << 31) if form["fresh"] else form["seed"], time.monotonic()
        stream = None
        try:
            stream = self.streams[session] = self.streamer.start(self._request(form | {"seed": seed}))
            yield '<p class="status">waiting</p>', seed
            for answer in stream:
                yield _shown(answer, time.monotonic() - begun), seed
        except (InputError, OSError) as error:
            yield _failed(error, form["image"]), seed
        finally:
            if stream is not None:
                stream.stop()
            if self.streams.get(session) is stream:
                self.streams.pop(session, None)

    def _request(self, form: dict[str, Any]) -> Request:
        task = form["task"]
        steps, guidance, sampler = form["steps"], form["guidance"], form["sampler"]
        strength = form["strength"] if task == "change" else 1.0
        return Request(
            task,
            form["prompt"],
            self._given(form["image"]) if task in GIVEN else None,
            TextSettings(max_tokens=form["max_tokens"], temperature=form["temperature"]),
            ImageSettings(steps=steps, guidance=guidance, sampler=sampler, strength=strength),
            form["count"],
            form["seed"],
        )

    def _given(self, path: str | None) -> Any:
        return path and read_image(Path(path), self.data.modalities[0], self.data.image_sizes[0], self.vae)

    def preview(self, path: str | None) -> str:
        """Return the HTML of an uploaded image as the model sees it."""
        try:
            given = self._given(path)
        except (InputError, OSError) as error:
            return _failed(error, path)
        if given is None:
            return ""
        pixels = shown_pixels(self.streamer.subject, 0, given[None])
        return fragment([Picture((pixels[0],), "")]) + '<p class="status">as the model sees it</p>'

    def stop(self, session: str) -> None:
        """Stop the answer that is being made for a session, if there is one."""
        if stream := self.streams.pop(session, None):
            stream.stop()


def _shown(answer: Answer, seconds: float) -> str:
    steps, images = answer.request.image.steps, sum(isinstance(piece, np.ndarray) for piece in answer.pieces)
    what = f"image {images}, " if answer.request.task == "write" and images else ""
    status = {
        "running": f"{what}step {answer.step} of {steps}" if answer.step else "writing",
        "stopped": "stopped",
        "done": "done",
    }[answer.state]
    pieces = (piece if isinstance(piece, str) else Picture((piece,), "") for piece in answer.pieces)
    return f'{fragment(pieces)}<p class="status">{status} · {seconds:.1f} s · seed {answer.request.seed}</p>'


def _failed(error: Exception, path: str | None) -> str:
    message = str(error).replace(f"{Path(path).parent}{os.sep}", "") if path else str(error)
    return f'<p class="error">{html.escape(message)}</p>'


if __name__ == "__main__":
    sys.exit(main())
