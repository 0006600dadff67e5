"""The gradio components of the page, and the handlers of their events."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_prompts.errors import printable
from lightning_prompts.methods.steering.human_feedback.choices import Action, Choice

if TYPE_CHECKING:
    from lightning_prompts.methods.steering.human_feedback.page import Page

SIDE, TICK = 256, 0.25  # pixels of an image on the page; seconds between updates
BUTTONS: dict[Action, str] = {
    "move": "Move",
    "others": "Other candidates",
    "undo": "Undo last move",
    "finish": "Finish",
}
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input:not([type=radio]), textarea")) return;
  const selected = document.querySelectorAll("#candidate input")[Number(event.key) - 1];
  const button = document.querySelector({m: "#move", o: "#others", u: "#undo", f: "#finish"}[event.key] || "#none");
  (selected || button)?.click();
});
</script>"""
HELP = (
    "Keys: **1** to **9** select a candidate, the arrow keys change the strength when the slider has the focus, **m** "
    "moves, **o** shows other candidates, **u** undoes the last move, **f** finishes."
)


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

    def html(self) -> str:
        """Return the prompt and the status as HTML, with both escaped."""
        prompt, status = (html.escape(printable(text)) for text in (self.prompt, self.status))
        return f"Prompt: <strong>{prompt}</strong><br>{status}" if prompt else status


@dataclass(frozen=True)
class Request:
    """A choice that the user made on the page, with the number of its question."""

    question: int
    choice: Choice
    preview: bool = False  # only show what the choice would give


class Interface:
    """The components of the page, and the functions that gradio calls for their events.

    Args:
        gradio: The gradio module.
        page: The page, whose view is shown and whose queue gets the requests.
    """

    def __init__(self, gradio: Any, page: Page) -> None:
        self.gradio, self.page = gradio, page
        with gradio.Blocks(title="Choose an image", analytics_enabled=False) as self.blocks:
            self._add_components()
            self._connect_events()

    def _add_components(self) -> None:
        """Add the components, from top to bottom."""
        gradio = self.gradio
        images: dict[str, Any] = {"interactive": False, "buttons": [], "height": SIDE}
        self.number, self.question = gradio.State(-1), gradio.State(0)
        self.status = gradio.HTML(self.page.view.html(), elem_id="status")
        self.candidates = gradio.Gallery(
            label="Candidates", columns=5, fit_columns=False, allow_preview=False, elem_id="candidates", **images
        )
        self.candidate = gradio.Radio(label="Selected candidate", choices=[], elem_id="candidate")
        self.strength = gradio.Slider(
            0, 1, 1, step=0.05, label="Strength", elem_id="strength",
            info="How far to move: 0 keeps the current image, 1 moves all the way to the selected candidate.",
        )  # fmt: skip
        with gradio.Row():
            self.buttons = {
                action: gradio.Button(label, elem_id=action, variant="primary" if action == "move" else "secondary")
                for action, label in BUTTONS.items()
            }
        with gradio.Row():
            self.current = gradio.Image(label="Current image", elem_id="current", **images)
            self.preview = gradio.Image(label="Preview of the move", elem_id="preview", **images)
            self.plane = gradio.Image(label="Map", elem_id="map", **images)
        self.trail = gradio.Gallery(
            label="History", columns=10, fit_columns=False, elem_id="trail",
            **images | {"height": 140},
        )  # fmt: skip
        gradio.Markdown(HELP)

    def _connect_events(self) -> None:
        """Connect the events of the components, and the timer that updates them."""
        quiet = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        choice = [self.question, self.candidate, self.strength]

        def select(event: Any) -> str:
            return str(event.index + 1)

        select.__annotations__["event"] = self.gradio.SelectData  # gradio passes the event by this annotation
        self.candidates.select(select, None, self.candidate, **quiet)
        for component in (self.candidate, self.strength):
            component.change(self.show_preview, choice, None, **quiet)
        for action, button in self.buttons.items():
            if action == "move":
                button.click(self.move, choice, None, **quiet)
            else:
                button.click(
                    lambda question, action=action: self.request(question, Choice(action)), self.question, None, **quiet
                )
        self.updated = [
            self.number, self.question, self.status, self.candidates, self.candidate, *self.buttons.values(),
            self.current, self.preview, self.plane, self.trail,
        ]  # fmt: skip
        self.gradio.Timer(TICK).tick(self.refresh, [self.number, self.question], self.updated, **quiet)

    def request(self, question: int, choice: Choice, preview: bool = False) -> None:
        """Put a choice into the page's queue."""
        self.page.requests.put(Request(question, choice, preview))

    def move(self, question: int, candidate: str | None, strength: float) -> None:
        """Request the move to the selected candidate."""
        if candidate is None:
            self.gradio.Info("Select a candidate first.")
        else:
            self.request(question, Choice("move", int(candidate) - 1, strength))

    def show_preview(self, question: int, candidate: str | None, strength: float) -> None:
        """Request the image of the move to the selected candidate."""
        if candidate is not None:
            self.request(question, Choice("move", int(candidate) - 1, strength), preview=True)

    def refresh(self, number: int, question: int) -> list[Any]:
        """Return the updates of a browser that has the view `number` and the question `question`."""
        gradio, view = self.gradio, self.page.view
        self.page.seen = max(self.page.seen, number)
        if number == view.number:
            return [gradio.skip() for _ in self.updated]
        new = question != view.question
        return [
            view.number,
            view.question,
            view.html(),
            gradio.Gallery(
                [(file, printable(text)) for file, text in view.candidates],
                selected_index=None if new else gradio.skip(),
            ),
            gradio.Radio(
                choices=[str(i + 1) for i in range(len(view.candidates))],
                **({"value": None} if new else {}),
                interactive=view.ready,
            ),
            *(
                gradio.Button(interactive=view.ready and (action != "undo" or len(view.trail) > 1))
                for action in self.buttons
            ),
            view.trail[-1] if view.trail else None,
            view.preview,
            view.plane,
            view.trail,
        ]
