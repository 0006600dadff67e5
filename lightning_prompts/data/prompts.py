"""Prompts of a person, to go on from."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import torch

from lightning_prompts.data.lists import read_rows, read_text
from lightning_prompts.data.problems import ProblemData, Step
from lightning_prompts.errors import UserError
from lightning_prompts.problems import Problem


class Prompts(ProblemData):
    """Prompts to find better or adversarial words, or embeddings, for; one problem each.

    Args:
        prompts: A prompt; a text file with one a line; a CSV or JSONL list with the column or key `prompt`; or a list of these.
        seed: Addresses every random draw.
    """

    given = "prompts that are not among --data.prompts"

    def __init__(self, prompts: str | list[str], seed: int = 0) -> None:
        super().__init__(seed)
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
        known, self.records, self.keys = self.folder.load(), {}, []
        prompts = read_prompts(self.prompts)
        for prompt, identity in itertools.product(prompts, self.method.identities):
            settings = {"prompt": prompt, "backbone": self.method.backbone.name, **identity}
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
            here = Problem(key, prompt, index=len(self.records), target_seed=identity.get("target_seed"))
            problem = known.get(key, here)
            problem.move_to(here)
            if problem.status == "failed":
                problem.status, problem.reason = "open", None
            try:
                if stage == "fit" and problem.status == "open":
                    self.method.check(prompt)
            except UserError as error:
                if len(prompts) == 1:
                    raise
                problem.status, problem.reason = "failed", str(error)
            self.records.setdefault(key, problem)
            self.keys.append(key)


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
    if not path.exists():
        raise UserError(f"There is no list {source!r}; check the path.")
    prompts = read_text(path).splitlines() if path.suffix.lower() == ".txt" else _listed(path)
    return [" ".join(prompt.split()) for prompt in prompts if prompt.strip()]


def _listed(path: Path) -> list[str]:
    prompts = []
    for line, row in read_rows(path, "prompt", "prompt"):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f"Line {line} of '{path}' has no text under 'prompt'.")
        prompts.append(prompt)
    return prompts
