"""The page on which the user chooses: gradio, on this machine only."""

from __future__ import annotations

import hashlib
import html
import logging
import os
import queue
import tempfile
import time
import webbrowser
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.errors import UserError, printable
from lightning_prompts.methods.steering.human_feedback.choices import Choice, Chooser, Round
from lightning_prompts.methods.steering.human_feedback.server import Server
from lightning_prompts.sampling.figures import to_image
from lightning_prompts.setting_types import NotNegative

log = logging.getLogger(__name__)

SIDE, TICK = 256, 0.25  # pixels of an image on the page; seconds between updates
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input:not([type=radio]), textarea")) return;
  const chosen = document.querySelectorAll("#candidate input")[Number(event.key) - 1];
  const button = document.querySelector({g: "#go", o: "#others", u: "#undo", f: "#finish"}[event.key] || "#none");
  (chosen || button)?.click();
});
</script>"""
HELP = "Keys: **1** to **9** choose a candidate, arrows on the slider change the strength, **g** moves there, **o** shows others, **u** undoes, **f** finishes."


@dataclass(frozen=True)
class View:
    """The content of the page: unescaped texts and image files; each update makes a new view."""

    number: int = 0
    question: int = 0
    prompt: str = ""
    status: str = "Generating the first images."
    ready: bool = False
    trail: list[str] = field(default_factory=list)
    candidates: list[tuple[str, str]] = field(default_factory=list)
    preview: str | None = None
    plane: str | None = None

    def files(self) -> set[str]:
        """Return the image files."""
        every = [*self.trail, *(file for file, _ in self.candidates), self.preview, self.plane]
        return {file for file in every if file is not None}


@dataclass(frozen=True)
class Request:
    """A choice that the user made on the page, with the number of its question."""

    question: int
    choice: Choice
    preview: bool = False  # only show what the choice would give


class Page(Chooser):
    """A page that shows the candidates and takes the user's choices, as long as the run lasts.

    Its state is in the run, so it can be reloaded, or closed and opened again. Images of the current round are in a
    temporary folder, which is deleted with the page.

    Args:
        port: Port on 127.0.0.1; 0 for the first free one from 7860.
        show: Open the page in the browser.
    """

    def __init__(self, port: NotNegative = 0, show: bool = True) -> None:
        if port > 65535:
            raise UserError(f"--model.chooser.port must be at most 65535, got {port}.")
        self.port, self.show = port, show
        self.view = View()
        self.requests: queue.Queue[Request] = queue.Queue()
        self.opened: ExitStack | None = None  # the server and its files
        self.seen = 0  # number of the newest view that a browser has

    # --- called by the run

    def open(self, backbone: Backbone, offline: bool) -> None:
        """Start the server."""
        try:
            import gradio
        except ModuleNotFoundError:
            raise UserError(
                "The page needs gradio, which is not installed; run pip install 'lightning-prompts[page]'."
            ) from None
        self.view, self.requests, self.seen = View(), queue.Queue(), 0  # nothing of an earlier search
        with ExitStack() as opened:
            folder = opened.enter_context(
                tempfile.TemporaryDirectory(prefix="lightning-prompts-page-", ignore_cleanup_errors=True)
            )
            self.images = Path(folder).resolve()
            opened.callback(_set_cache, _set_cache(str(self.images)))
            shared = Path(gradio.route_utils.DEFAULT_TEMP_DIR)
            unused = [empty for empty in (shared / "vibe_edit_history", shared) if not empty.exists()]
            server = Server(
                gradio, self.build(gradio), self.port, self.images, head=KEYS, footer_links=[],
                theme=gradio.themes.Default(font="sans-serif", font_mono="monospace"),
            )  # fmt: skip
            opened.callback(server.close)
            for empty in unused:  # gradio creates them for features that this page does not have
                with suppress(OSError):
                    empty.rmdir()
            self.opened = opened.pop_all()
        log.info("Choose on %s (Ctrl-C stops, and your choices so far are kept).", server.address)
        if self.show:
            webbrowser.open(server.address)

    def choose(self, question: Round) -> Choice | None:
        """Show the candidates on the page and wait for an answer."""
        moves, count, number = len(question.images) - 1, len(question.texts), self.view.question + 1
        self.publish(
            question=number, prompt=question.prompt, status="generating images.", ready=False,
            trail=[self.save(_enlarged(x)) for x in question.images], candidates=[], preview=None,
            plane=self.save(_plane(question)),
        )  # fmt: skip
        for i in range(count):
            self.publish(status=f"generating candidate {i + 1} of {count}.")
            candidate = self.save(_enlarged(question.generate(i, 1.0))), f"{i + 1}  {question.texts[i]}"
            self.publish(candidates=[*self.view.candidates, candidate])
        self.publish(ready=True, status=f"after move {moves}: which one do you like?")
        while not question.stopped():
            try:
                request = self.requests.get(timeout=0.2)
            except queue.Empty:
                continue
            if request.question != number:  # a second click on an answered question
                continue
            if (
                request.preview and not self.requests.empty()
            ):  # a moving slider makes more requests than images can be generated
                continue
            if not request.preview:
                self.publish(ready=False, status="generating images.")
                return request.choice
            image = question.generate(request.choice.candidate, request.choice.strength)
            self.publish(preview=self.save(_enlarged(image)))
        return None

    def publish(self, **changes: Any) -> None:
        """Replace the view, and delete the images that are no longer shown."""
        before = self.view
        self.view = replace(before, number=before.number + 1, **changes)
        for file in before.files() - self.view.files():
            Path(file).unlink(missing_ok=True)

    def save(self, image: Image.Image) -> str:
        """Save an image, named by its content so that a browser loads it once, and return its file."""
        name = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:32]
        file = self.images / f"{name}.png"
        if not file.exists():
            image.save(file)
        return str(file)

    def close(self, message: str) -> None:
        """Show a message, wait until an open page has it, and stop the server."""
        if self.opened is None:
            return
        opened, self.opened = self.opened, None
        with opened:  # also after a second Ctrl-C
            self.publish(prompt="", status=message, ready=False, candidates=[], preview=None)
            until = time.monotonic() + 4 * TICK
            while self.seen < self.view.number and time.monotonic() < until:
                time.sleep(TICK / 4)

    # --- called by the browser

    def build(self, gradio: Any) -> Any:
        """Build the page's components and connect their events."""
        with gradio.Blocks(title="Which one do you like?", analytics_enabled=False) as page:
            shown: dict[str, Any] = {"interactive": False, "buttons": [], "height": SIDE}
            number, question = gradio.State(-1), gradio.State(0)
            status = gradio.HTML(_text(self.view), elem_id="status")
            gallery = gradio.Gallery(
                label="Candidates", columns=5, fit_columns=False, allow_preview=False, elem_id="candidates", **shown
            )
            candidate = gradio.Radio(label="Candidate", choices=[], elem_id="candidate")
            strength = gradio.Slider(0, 1, 1, step=0.05, label="Strength", elem_id="strength")
            with gradio.Row():
                buttons = [
                    gradio.Button(text, elem_id=name, variant="primary" if name == "go" else "secondary")
                    for name, text in (("go", "Go there"), ("others", "Others"), ("undo", "Undo"), ("finish", "Finish"))
                ]
            with gradio.Row():
                here = gradio.Image(label="Here", elem_id="here", **shown)
                preview = gradio.Image(label="There, at this strength", elem_id="preview", **shown)
                plane = gradio.Image(label="Map", elem_id="map", **shown)
            trail = gradio.Gallery(
                label="The way here", columns=10, fit_columns=False, elem_id="trail", **shown | {"height": 140}
            )
            gradio.Markdown(HELP)
            parts = [number, question, status, gallery, candidate, *buttons, here, preview, plane, trail]

            def refresh(had: int, had_question: int) -> list[Any]:
                view = self.view
                self.seen = max(self.seen, had)
                if had == view.number:
                    return [gradio.skip() for _ in parts]
                count, ready = len(view.candidates), view.ready
                names = [str(i + 1) for i in range(count)]
                new = had_question != view.question
                return [
                    view.number,
                    view.question,
                    _text(view),
                    gradio.Gallery(
                        [(file, printable(text)) for file, text in view.candidates],
                        selected_index=None if new else gradio.skip(),
                    ),
                    gradio.Radio(choices=names, **({"value": None} if new else {}), interactive=ready),
                    *(gradio.Button(interactive=ready and (i != 2 or len(view.trail) > 1)) for i in range(4)),
                    view.trail[-1] if view.trail else None,
                    view.preview,
                    view.plane,
                    view.trail,
                ]

            def request(number: int, choice: Choice, preview: bool = False) -> None:
                self.requests.put(Request(number, choice, preview))

            def go(number: int, name: str | None, strength: float) -> None:
                if name is None:
                    gradio.Info("Choose a candidate first.")
                else:
                    request(number, Choice("go", int(name) - 1, strength))

            def show_preview(number: int, name: str | None, strength: float) -> None:
                if name is not None:
                    request(number, Choice("go", int(name) - 1, strength), preview=True)

            def selected(event: Any) -> str:
                return str(event.index + 1)

            selected.__annotations__["event"] = gradio.SelectData  # gradio passes the event by this annotation

            quiet = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
            gallery.select(selected, None, candidate, **quiet)
            for changed in (candidate.change, strength.change):
                changed(show_preview, [question, candidate, strength], None, **quiet)
            buttons[0].click(go, [question, candidate, strength], None, **quiet)
            for button, action in zip(buttons[1:], ("others", "undo", "finish"), strict=True):
                button.click(lambda number, action=action: request(number, Choice(action)), question, None, **quiet)
            gradio.Timer(TICK).tick(refresh, [number, question], parts, **quiet)
        return page


def _set_cache(folder: str | None) -> str | None:
    """Set the folder of gradio's files, None for the default that all pages share; return the folder before."""
    before = os.environ.pop("GRADIO_TEMP_DIR", None)
    if folder is not None:
        os.environ["GRADIO_TEMP_DIR"] = folder
    return before


def _text(view: View) -> str:
    """Return the prompt and the status as HTML, with both escaped."""
    prompt, status = (html.escape(printable(text)) for text in (view.prompt, view.status))
    return f"<strong>{prompt}</strong> {status}" if prompt else status


def _enlarged(tensor: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [-1, 1], and enlarge it by a whole factor if it is small."""
    image = to_image(tensor)
    larger = max(1, SIDE // image.width)
    return image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)


def _plane(question: Round) -> Image.Image:
    """Draw the map: the moves so far, which end in a dot, and the candidates' numbers."""
    points = torch.cat([question.positions, question.candidate_positions])
    low, high = points.min(0).values, points.max(0).values
    places = ((points - low) / (high - low).max().clamp(min=1e-6) * (SIDE - 40) + 20).tolist()
    canvas, here = Image.new("RGB", (SIDE, SIDE), "white"), len(question.positions) - 1
    pen = ImageDraw.Draw(canvas)
    pen.line([tuple(place) for place in places[: here + 1]], fill="orange", width=2)
    for i, (x, y) in enumerate(places):
        if i <= here:
            pen.circle((x, y), 6 if i == here else 2, fill="orange")
        else:
            pen.line([places[here][0], places[here][1], x, y], fill="lightgray")
            pen.text((x, y), str(i - here), fill="black", font_size=16, anchor="mm")
    return canvas
