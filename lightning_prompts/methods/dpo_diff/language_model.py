"""Synonyms and antonyms that a language model gives for a prompt."""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning_prompts.backbones.hub import hub_access
from lightning_prompts.errors import UserError
from lightning_prompts.runs.atomic_io import atomic_write

Kind = Literal["synonyms", "antonyms"]
ASKS = 5  # times that a prompt is asked about before it is given up
WANTED: dict[Kind, str] = {
    "synonyms": "five words or short phrases that could stand in its place without changing what the sentence means",
    "antonyms": "five words or short phrases that mean its opposite",
}
QUESTION = """For each meaningful word of the sentence below, give {wanted}.
Write one line a word, the word first, then an arrow, then the five separated by commas, and nothing else. For example:
big -> large, huge, great, giant, vast

Sentence: {prompt}
"""


class LanguageModel:
    """Asks a model on this machine, or an endpoint that speaks OpenAI's protocol, and remembers the answers on disk.

    Args:
        name: Folder or hub id of a causal language model, or the URL of an endpoint such as `http://localhost:8000/v1`, with the
            model's name behind a `#`. The endpoint's key, if it needs one, is in the environment variable OPENAI_API_KEY.
        cache: File of earlier answers.
        offline: Do not connect to the hub.
    """

    def __init__(self, name: str, cache: Path, offline: bool = False) -> None:
        self.name, self.cache, self.offline = name, cache, offline
        self._answer: Callable[[str, int], str] | None = None

    def __call__(self, prompt: str, kind: Kind) -> dict[str, list[str]]:
        """Words of a prompt and what can stand in their place.

        Raises:
            UserError: The endpoint is down, or no answer in `ASKS` had the form that was asked for.
        """
        question = QUESTION.format(wanted=WANTED[kind], prompt=prompt)
        key = hashlib.sha256(f"{self.name}\n{question}".encode()).hexdigest()[:16]
        known = self._known()
        if key in known:
            return dict(known[key]["words"])
        said = ""
        for attempt in range(ASKS):
            said = self._ask(question, attempt)
            words = parse(said, prompt)
            if is_usable(words):
                known = self._known()  # another process may have asked, too
                known[key] = {"model": self.name, "prompt": prompt, "kind": kind, "words": words}
                atomic_write(self.cache, (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode())
                return words
        raise UserError(
            f"The language model {self.name!r} was asked {ASKS} times for the {kind} of {prompt!r} and gave no list of words (last: "
            f"{said[:60]!r}); give another model or a JSON file."
        )

    def _known(self) -> dict[str, Any]:
        try:
            known = json.loads(self.cache.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"The answers in {self.cache} cannot be read; delete the file to ask again.") from error
        return known if isinstance(known, dict) else {}

    def _ask(self, question: str, attempt: int) -> str:
        if self.name.startswith(("http://", "https://")):
            return self._ask_endpoint(question, attempt)
        if self._answer is None:
            self._answer = local_model(self.name, self.offline)
        return self._answer(question, attempt)

    def _ask_endpoint(self, question: str, attempt: int) -> str:
        url, _, model = self.name.partition("#")
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.3 * attempt,
            "seed": attempt,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return str(json.loads(answer.read())["choices"][0]["message"]["content"])
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"The endpoint {url} cannot be reached ({reason}); start it, or give a JSON file."
            ) from error
        except (ValueError, KeyError, IndexError, TypeError):
            return ""  # no answer in the protocol's form is no list of words either


def local_model(name: str, offline: bool) -> Callable[[str, int], str]:
    """A causal language model that answers a question; the first time what is likeliest, then by chance."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with hub_access(offline):
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
            model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, local_files_only=offline).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"The language model {name!r} cannot be loaded; give a folder or hub id with safetensors."
        ) from error

    @torch.no_grad()
    def answer(question: str, attempt: int) -> str:
        """What it says; each attempt is another draw."""
        if tokenizer.chat_template:
            message = [{"role": "user", "content": question}]
            question = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(question, return_tensors="pt").input_ids.to(model.device)
        most = min(400, (getattr(model.config, "max_position_embeddings", None) or 2048) - ids.shape[1])
        torch.manual_seed(attempt)
        sampling = {"do_sample": True, "temperature": 0.3 * attempt} if attempt else {"do_sample": False}
        said = model.generate(ids, max_new_tokens=most, pad_token_id=tokenizer.eos_token_id, **sampling)
        return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


def parse(answer: str, prompt: str) -> dict[str, list[str]]:
    """The words and substitutes of an answer in two columns; lines of another form, and words that the prompt lacks, are left out."""
    found: dict[str, list[str]] = {}
    for line in answer.splitlines():
        match = re.fullmatch(r"\s*(?:[-*•]|\d+[.)])?\s*[\"'`*]*([^\"'`*>:=]+?)[\"'`*]*\s*(?:->|→|=>|:)\s*(.+)", line)
        if not match or not re.search(rf"(?<!\w){re.escape(match[1])}(?!\w)", prompt, re.IGNORECASE):
            continue
        others = [re.sub(r"^[\"'`*\s]+|[\"'`*.;\s]+$", "", other).lower() for other in match[2].split(",")]
        others = [other for other in dict.fromkeys(others) if re.search(r"\w", other) and other != match[1].lower()]
        if others:
            found.setdefault(match[1], others)
    return found


def is_usable(words: dict[str, list[str]]) -> bool:
    """Whether an answer has words, and not too many with a single substitute, which is how a misread list looks."""
    lonely = sum(len(others) == 1 for others in words.values())
    return bool(words) and lonely <= 0.4 * len(words)
