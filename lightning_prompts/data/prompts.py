"""Prompts of a person, to be improved or broken."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import torch

from lightning_prompts.data.problems import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.problems import Problem


class Prompts(ProblemData):
    """Prompts to find better or adversarial words for, one problem each.

    Args:
        prompts: A prompt; a text file with one a line; a CSV or JSONL list with the column or key `prompt`; or a list of these.
        seed: Addresses every random draw.
    """

    def __init__(self, prompts: str | list[str], seed: int = 0) -> None:
        super().__init__(seed)
        self.given = "prompts that are not among --data.prompts"
        self.prompts = [prompts] if isinstance(prompts, str) else prompts

    @property
    def steps(self) -> int:  # type: ignore[override]
        """As many as the method takes at most."""
        return int(self.method.steps)

    def step(self, number: int) -> Step:
        """A step, whose noise is the method's."""
        return Step(number, torch.empty(len(self.method.problems), 0, dtype=torch.long))

    def setup(self, stage: str) -> None:
        """Reads the prompts; what is done is skipped."""
        known, self.records = self.folder.load(), {}
        prompts = read_prompts(self.prompts)
        for index, prompt in enumerate(prompts):
            settings = {"prompt": prompt, "backbone": self.method.backbone.name, "task": self.method.task}
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
            problem = known.get(key) or Problem(key, prompt)
            problem.index = index
            if problem.status == "failed":
                problem.status, problem.reason = "open", None
            try:
                if stage == "fit" and problem.status == "open":
                    self.method.space(prompt)
            except UserError as error:
                if len(prompts) == 1:
                    raise
                problem.status, problem.reason = "failed", str(error)
            self.records.setdefault(key, problem)


def read_prompts(sources: list[str]) -> list[str]:
    """The prompts that a person names, each once, in their order.

    Raises:
        UserError: There is none, one is empty, or a list is malformed.
    """
    prompts = [prompt for source in sources for prompt in _expand(source)]
    if not prompts:
        raise UserError("No prompts were given; give --data.prompts a text, or a .txt, .csv or .jsonl file of prompts.")
    return list(dict.fromkeys(prompts))


def _expand(source: str) -> list[str]:
    path = Path(source)
    if path.suffix.lower() not in (".txt", ".csv", ".jsonl"):
        if not source.strip():
            raise UserError("A prompt is empty; write what the picture is to show.")
        return [" ".join(source.split())]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"The list {source!r} cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The list {source!r} is not UTF-8 text; save it as UTF-8.") from error
    rows = _rows(path, text)
    return [" ".join(row.split()) for row in rows if row.strip()]


def _rows(path: Path, text: str) -> list[str]:
    if path.suffix.lower() == ".txt":
        return text.splitlines()
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if "prompt" not in (reader.fieldnames or ()):
            raise UserError(f"Line 1 of {str(path)!r} has no column 'prompt'; begin with a header.")
        return [row["prompt"] or "" for row in reader]
    prompts = []
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = json.loads(content)
            except ValueError as error:
                raise UserError(f"Line {line} of {str(path)!r} is not valid JSON; write one object a line.") from error
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise UserError(f"Line {line} of {str(path)!r} has no text under 'prompt'.")
            prompts.append(row["prompt"])
    return prompts
