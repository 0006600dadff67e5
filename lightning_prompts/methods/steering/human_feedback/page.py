"""The page on which the user chooses, which only this machine can open."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import tempfile
import time
import webbrowser
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.errors import UserError
from lightning_prompts.methods.steering.human_feedback.choices import Choice, Chooser, Round
from lightning_prompts.methods.steering.human_feedback.interface import KEYS, SIDE, TICK, Interface, Request, View
from lightning_prompts.methods.steering.human_feedback.server import Server
from lightning_prompts.sampling.figures import to_image
from lightning_prompts.setting_types import NotNegative

log = logging.getLogger(__name__)


class Page(Chooser):
    """A page in the browser that shows the candidates and takes the user's choices.

    The run has its state, so the page can be reloaded, or closed and opened again. Images of the current round are in a
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

    def open(self, backbone: Backbone, offline: bool) -> None:
        """Start the server of the page, and open the page in the browser."""
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
                gradio, Interface(gradio, self).blocks, self.port, self.images, head=KEYS, footer_links=[],
                theme=gradio.themes.Default(font="sans-serif", font_mono="monospace"),
            )  # fmt: skip
            opened.callback(server.close)
            for empty in unused:  # gradio creates them for features that this page does not have
                with suppress(OSError):
                    empty.rmdir()
            self.opened = opened.pop_all()
        log.info("Choose images on %s (Ctrl-C stops the search and keeps your choices).", server.address)
        if self.show:
            webbrowser.open(server.address)

    def choose(self, question: Round) -> Choice | None:
        """Show the candidates on the page and wait for an answer."""
        moves, count, number = len(question.images) - 1, len(question.texts), self.view.question + 1
        self.publish(
            question=number, prompt=question.prompt, status="Generating images.", ready=False,
            trail=[self.save(_enlarged(x)) for x in question.images], candidates=[], preview=None,
            plane=self.save(_plane(question)),
        )  # fmt: skip
        for i in range(count):
            self.publish(status=f"Generating candidate {i + 1} of {count}.")
            candidate = self.save(_enlarged(question.generate(i, 1.0))), f"{i + 1}  {question.texts[i]}"
            self.publish(candidates=[*self.view.candidates, candidate])
        self.publish(ready=True, status=f"Moves so far: {moves}. Select the candidate that you like best.")
        while not question.stopped():
            try:
                request = self.requests.get(timeout=0.2)
            except queue.Empty:
                continue
            if request.question != number:  # a second click on an answered question
                continue
            if request.preview and not self.requests.empty():
                continue  # a moving slider makes more requests than images can be generated
            if not request.preview:
                self.publish(ready=False, status="Generating images.")
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


def _set_cache(folder: str | None) -> str | None:
    """Set the folder of gradio's files, None for the default that all pages share; return the folder before."""
    before = os.environ.pop("GRADIO_TEMP_DIR", None)
    if folder is not None:
        os.environ["GRADIO_TEMP_DIR"] = folder
    return before


def _enlarged(tensor: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [-1, 1], and enlarge it by a whole factor if it is small."""
    image = to_image(tensor)
    larger = max(1, SIDE // image.width)
    return image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)


def _plane(question: Round) -> Image.Image:
    """Draw the map: the moves so far, which end in a dot, and the candidates' numbers."""
    points = torch.cat([question.positions, question.candidate_positions])
    low, high = points.min(0).values, points.max(0).values
    scale = (SIDE - 40) / (high - low).max().clamp(min=1e-6)
    places = ((points - (low + high) / 2) * scale + SIDE / 2).tolist()
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
