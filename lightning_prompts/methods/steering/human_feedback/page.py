"""The page on which a person chooses: gradio, on this machine alone."""

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
from lightning_prompts.methods.steering.human_feedback.door import Server
from lightning_prompts.sampling.figures import to_image
from lightning_prompts.setting_types import NotNegative

log = logging.getLogger(__name__)

SIDE, TICK = 256, 0.25  # pixels of a small picture on the page; seconds between looks at what is new
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input:not([type=radio]), textarea")) return;
  const chosen = document.querySelectorAll("#candidate input")[Number(event.key) - 1];
  const button = document.querySelector({g: "#go", o: "#others", u: "#undo", f: "#finish"}[event.key] || "#none");
  (chosen || button)?.click();
});
</script>"""
HELP = "Keys: **1** to **9** choose a candidate, arrows on the slider change the strength, **g** goes, **o** shows others, **u** undoes, **f** finishes."


@dataclass(frozen=True)
class View:
    """What the page shows: texts as they stand, and files of pictures; it never changes, another one takes its place."""

    number: int = 0
    question: int = 0
    prompt: str = ""
    status: str = "The first pictures are being drawn."
    ready: bool = False
    trail: list[str] = field(default_factory=list)
    candidates: list[tuple[str, str]] = field(default_factory=list)
    preview: str | None = None
    plane: str | None = None

    def pictures(self) -> set[str]:
        """The files."""
        every = [*self.trail, *(picture for picture, _ in self.candidates), self.preview, self.plane]
        return {picture for picture in every if picture is not None}


@dataclass(frozen=True)
class Asked:
    """What a person has asked for on the page, and of which question."""

    question: int
    choice: Choice
    look: bool = False  # at what it would give


class Page(Chooser):
    """A page that shows the candidates and takes the person's choices; it ends with the run.

    Everything that it shows is the run's, so it can be reloaded or closed and opened again. It has only the pictures of the
    current round, in a temporary folder that goes with it.

    Args:
        port: Where it listens on 127.0.0.1; 0 for the first free one from 7860.
        show: Open it in the browser.
    """

    def __init__(self, port: NotNegative = 0, show: bool = True) -> None:
        if port > 65535:
            raise UserError(f"A port is at most 65535, not {port}; change --model.chooser.port.")
        self.port, self.show = port, show
        self.view = View()
        self.asked: queue.Queue[Asked] = queue.Queue()
        self.opened: ExitStack | None = None  # the server and its files
        self.seen = 0  # the newest view that a browser has

    # --- the run's side

    def open(self, backbone: Backbone, offline: bool) -> None:
        """Starts the server."""
        try:
            import gradio
        except ModuleNotFoundError:
            raise UserError(
                "The page needs gradio, which is not installed; run pip install 'lightning-prompts[page]'."
            ) from None
        self.view, self.asked, self.seen = View(), queue.Queue(), 0  # nothing of a search before
        with ExitStack() as opened:
            folder = opened.enter_context(
                tempfile.TemporaryDirectory(prefix="lightning-prompts-page-", ignore_cleanup_errors=True)
            )
            self.pictures = Path(folder).resolve()
            opened.callback(_set_cache, _set_cache(str(self.pictures)))
            shared = Path(gradio.route_utils.DEFAULT_TEMP_DIR)
            unasked = [empty for empty in (shared / "vibe_edit_history", shared) if not empty.exists()]
            server = Server(
                gradio, self.build(gradio), self.port, self.pictures, head=KEYS, footer_links=[],
                theme=gradio.themes.Default(font="sans-serif", font_mono="monospace"),
            )  # fmt: skip
            opened.callback(server.close)
            for empty in unasked:  # which gradio makes for what this page does not have
                with suppress(OSError):
                    empty.rmdir()
            self.opened = opened.pop_all()
        log.info("Choose on %s (Ctrl-C stops, and what is chosen by then is kept).", server.address)
        if self.show:
            webbrowser.open(server.address)

    def choose(self, question: Round) -> Choice | None:
        """Draws the candidates onto the page and waits for an answer."""
        moves, count, number = len(question.trail) - 1, len(question.ends), self.view.question + 1
        self.publish(
            question=number, prompt=question.prompt, status="on the way.", ready=False,
            trail=[self.keep(_shown(x)) for x in question.pictures], candidates=[], preview=None,
            plane=self.keep(_plane(question)),
        )  # fmt: skip
        for i in range(count):
            self.publish(status=f"drawing candidate {i + 1} of {count}.")
            candidate = self.keep(_shown(question.draw(i, 1.0))), f"{i + 1}  {question.texts[i]}"
            self.publish(candidates=[*self.view.candidates, candidate])
        self.publish(ready=True, status=f"after move {moves}: which one do you like?")
        while not question.stopped():
            try:
                asked = self.asked.get(timeout=0.2)
            except queue.Empty:
                continue
            if asked.question != number:  # a second click on what has been answered
                continue
            if asked.look and not self.asked.empty():  # a slider that moves asks for more than can be drawn
                continue
            if not asked.look:
                self.publish(ready=False, status="on the way.")
                return asked.choice
            self.publish(preview=self.keep(_shown(question.draw(asked.choice.candidate, asked.choice.strength))))
        return None

    def publish(self, **changes: Any) -> None:
        """Shows something new, and deletes the pictures that are no longer shown."""
        before = self.view
        self.view = replace(before, number=before.number + 1, **changes)
        for picture in before.pictures() - self.view.pictures():
            Path(picture).unlink(missing_ok=True)

    def keep(self, picture: Image.Image) -> str:
        """The file of a picture, by whose name a browser knows whether it has it already."""
        name = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:32]
        file = self.pictures / f"{name}.png"
        if not file.exists():
            picture.save(file)
        return str(file)

    def close(self, last_words: str) -> None:
        """Says what has become of the run, waits until a page that is open has said it, and stops the server."""
        if self.opened is None:
            return
        opened, self.opened = self.opened, None
        with opened:  # also at a second Ctrl-C
            self.publish(prompt="", status=last_words, ready=False, candidates=[], preview=None)
            until = time.monotonic() + 4 * TICK
            while self.seen < self.view.number and time.monotonic() < until:
                time.sleep(TICK / 4)

    # --- the browser's side

    def build(self, gradio: Any) -> Any:
        """The page's parts and what they do."""
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
                        [(picture, printable(text)) for picture, text in view.candidates],
                        selected_index=None if new else gradio.skip(),
                    ),
                    gradio.Radio(choices=names, **({"value": None} if new else {}), interactive=ready),
                    *(gradio.Button(interactive=ready and (i != 2 or len(view.trail) > 1)) for i in range(4)),
                    view.trail[-1] if view.trail else None,
                    view.preview,
                    view.plane,
                    view.trail,
                ]

            def ask(of: int, choice: Choice, look: bool = False) -> None:
                self.asked.put(Asked(of, choice, look))

            def go(of: int, name: str | None, far: float) -> None:
                if name is None:
                    gradio.Info("Choose a candidate first.")
                else:
                    ask(of, Choice("go", int(name) - 1, far))

            def look(of: int, name: str | None, far: float) -> None:
                if name is not None:
                    ask(of, Choice("go", int(name) - 1, far), look=True)

            def picked(event: Any) -> str:
                return str(event.index + 1)

            picked.__annotations__["event"] = gradio.SelectData  # by which gradio knows what to give

            quiet = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
            gallery.select(picked, None, candidate, **quiet)
            for changed in (candidate.change, strength.change):
                changed(look, [question, candidate, strength], None, **quiet)
            buttons[0].click(go, [question, candidate, strength], None, **quiet)
            for button, action in zip(buttons[1:], ("others", "undo", "finish"), strict=True):
                button.click(lambda of, action=action: ask(of, Choice(action)), question, None, **quiet)
            gradio.Timer(TICK).tick(refresh, [number, question], parts, **quiet)
        return page


def _set_cache(folder: str | None) -> str | None:
    """Where gradio keeps the files of its pages, by default in a folder that all of them share; returns where it was before."""
    before = os.environ.pop("GRADIO_TEMP_DIR", None)
    if folder is not None:
        os.environ["GRADIO_TEMP_DIR"] = folder
    return before


def _text(view: View) -> str:
    """What the page says, as HTML in which a prompt is text, whatever characters it has."""
    prompt, status = (html.escape(printable(text)) for text in (view.prompt, view.status))
    return f"<strong>{prompt}</strong> {status}" if prompt else status


def _shown(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1]; a small one in larger pixels."""
    image = to_image(picture)
    larger = max(1, SIDE // image.width)
    return image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)


def _plane(question: Round) -> Image.Image:
    """The map: the way here, which ends in a dot, and the candidates' numbers."""
    points = torch.cat([question.trail, question.ends])
    low, high = points.min(0).values, points.max(0).values
    places = ((points - low) / (high - low).max().clamp(min=1e-6) * (SIDE - 40) + 20).tolist()
    canvas, here = Image.new("RGB", (SIDE, SIDE), "white"), len(question.trail) - 1
    pen = ImageDraw.Draw(canvas)
    pen.line([tuple(place) for place in places[: here + 1]], fill="orange", width=2)
    for i, (x, y) in enumerate(places):
        if i <= here:
            pen.circle((x, y), 6 if i == here else 2, fill="orange")
        else:
            pen.line([places[here][0], places[here][1], x, y], fill="lightgray")
            pen.text((x, y), str(i - here), fill="black", font_size=16, anchor="mm")
    return canvas
