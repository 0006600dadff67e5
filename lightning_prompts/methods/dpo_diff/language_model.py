"""Synonyms and antonyms of a prompt's words from a language model."""

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
ATTEMPTS = 5  # answers per prompt before the search gives up
REQUESTS: dict[Kind, str] = {
    "synonyms": "five words or short phrases that could stand in its place without changing what the sentence means",
    "antonyms": "five words or short phrases that mean its opposite",
}
QUESTION = """For each meaningful word of the sentence below, give {wanted}.
Write one line a word, the word first, then an arrow, then the five separated by commas, and nothing else. For example:
big -> large, huge, great, giant, vast

Sentence: {prompt}
"""


class LanguageModel:
    """Ask a local model, or an endpoint with OpenAI's protocol, and cache the answers on disk.

    Args:
        name: Folder or hub id of a causal language model, or the URL of an endpoint such as `http://localhost:8000/v1`,
            with the model's name after a `#`. An endpoint that needs a key gets that of the environment variable
            OPENAI_API_KEY.
        cache: File of earlier answers.
        offline: Do not connect to the hub.
    """

    def __init__(self, name: str, cache: Path, offline: bool = False) -> None:
        self.name, self.cache, self.offline = name, cache, offline
        self._answer: Callable[[str, int], str] | None = None

    def __call__(self, prompt: str, kind: Kind) -> dict[str, list[str]]:
        """Return words of a prompt with their synonyms or antonyms.

        Raises:
            UserError: The endpoint is down, or none of `ATTEMPTS` answers has the required format.
        """
        question = QUESTION.format(wanted=REQUESTS[kind], prompt=prompt)
        key = hashlib.sha256(f"{self.name}\n{question}".encode()).hexdigest()[:16]
        known = self._read_cache()
        if key in known:
            return dict(known[key]["words"])
        answer = ""
        for attempt in range(ATTEMPTS):
            answer = self._ask(question, attempt)
            words = parse_answer(answer, prompt)
            if is_usable(words):
                known = self._read_cache()  # another process may have added answers
                known[key] = {"model": self.name, "prompt": prompt, "kind": kind, "words": words}
                atomic_write(self.cache, (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode())
                return words
        raise UserError(
            f"The language model {self.name!r} was asked {ATTEMPTS} times for the {kind} of {prompt!r} and gave no "
            f"list of words (last: {answer[:60]!r}); give another model or a JSON file."
        )

    def _read_cache(self) -> dict[str, Any]:
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
            self._answer = load_local_model(self.name, self.offline)
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
            with urllib.request.urlopen(request, timeout=120) as response:
                return str(json.loads(response.read())["choices"][0]["message"]["content"])
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"The endpoint {url} cannot be reached ({reason}); start it, or give a JSON file."
            ) from error
        except (ValueError, KeyError, IndexError, TypeError):
            return ""  # not in the protocol's format, so that the next attempt follows


def load_local_model(name: str, offline: bool) -> Callable[[str, int], str]:
    """Load a causal language model; return a function that answers greedily at attempt 0, then by sampling."""
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
        """Generate an answer; each attempt has its own seed."""
        if tokenizer.chat_template:
            message = [{"role": "user", "content": question}]
            question = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(question, return_tensors="pt").input_ids.to(model.device)
        max_new_tokens = min(400, (getattr(model.config, "max_position_embeddings", None) or 2048) - ids.shape[1])
        torch.manual_seed(attempt)
        sampling = {"do_sample": True, "temperature": 0.3 * attempt} if attempt else {"do_sample": False}
        output = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


def parse_answer(answer: str, prompt: str) -> dict[str, list[str]]:
    """Parse the lines `word -> other, words` of an answer; skip other lines, and words outside the prompt."""
    words: dict[str, list[str]] = {}
    for line in answer.splitlines():
        match = re.fullmatch(r"\s*(?:[-*•]|\d+[.)])?\s*[\"'`*]*([^\"'`*>:=]+?)[\"'`*]*\s*(?:->|→|=>|:)\s*(.+)", line)
        if not match or not re.search(rf"(?<!\w){re.escape(match[1])}(?!\w)", prompt, re.IGNORECASE):
            continue
        others = [re.sub(r"^[\"'`*\s]+|[\"'`*.;\s]+$", "", other).lower() for other in match[2].split(",")]
        others = [other for other in dict.fromkeys(others) if re.search(r"\w", other) and other != match[1].lower()]
        if others:
            words.setdefault(match[1], others)
    return words


def is_usable(words: dict[str, list[str]]) -> bool:
    """Return whether an answer has words, at most 40% of them with a single substitute as in other formats."""
    single = sum(len(others) == 1 for others in words.values())
    return bool(words) and single <= 0.4 * len(words)
