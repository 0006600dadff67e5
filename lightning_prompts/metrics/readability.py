"""Metrics of a prompt's readability."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import quiet
from lightning_prompts.backbones.hub import hub_access
from lightning_prompts.errors import UserError
from lightning_prompts.metrics.mean import Mean
from lightning_prompts.metrics.words import all_words


class DictionaryWords(Mean):
    """Share of the prompts' words that are in a dictionary, in [0, 1]; higher is better, NaN without words.

    Words are sequences of letters and digits, with hyphens and apostrophes inside; case is ignored.

    Args:
        dictionary: Known words.
    """

    higher_is_better = True

    def __init__(self, dictionary: Collection[str]) -> None:
        super().__init__()
        self.dictionary = frozenset(word.lower() for word in dictionary)

    def update(self, prompts: Sequence[str]) -> None:
        """Add the words of B prompts."""
        self.add(torch.tensor([word in self.dictionary for prompt in prompts for word in all_words(prompt)]))


class SpecialCharacters(Mean):
    """Share of the prompts' characters that are no letters, accents, digits or spaces.

    In [0, 1]; lower is better, NaN without characters.
    """

    higher_is_better = False

    def update(self, prompts: Sequence[str]) -> None:
        """Add the characters of B prompts."""
        self.add(torch.tensor([_is_special(character) for prompt in prompts for character in prompt]))


class Perplexity(Mean):
    """Exponential of the mean negative log-likelihood per token under a causal language model.

    1 or more; lower is better, NaN without scored tokens. The mean is over the tokens of all prompts. If the tokenizer
    has a beginning-of-sequence token, it precedes each prompt, and all of the prompt's tokens are scored; else a
    prompt's first token is not scored. Prompts longer than the model's context are truncated.

    Args:
        name: Folder or hub id of a causal language model in safetensors, with its tokenizer.
        offline: Do not connect to the hub.
    """

    higher_is_better = False

    def __init__(self, name: str, offline: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.model = _load_language_model(name, offline)

    @torch.no_grad()
    def update(self, prompts: Sequence[str]) -> None:
        """Add the tokens of B prompts."""
        self.model.eval()  # a parent module's train() turns its dropout on
        bos, context = self.tokenizer.bos_token_id, getattr(self.model.config, "max_position_embeddings", None)
        for prompt in prompts:
            ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
            ids = torch.tensor(([] if bos is None else [bos]) + ids, device=self.device)[:context]
            if len(ids) > 1:
                logits = self.model(input_ids=ids[None]).logits[0, :-1]
                self.add(F.cross_entropy(logits, ids[1:], reduction="none"))

    def compute(self) -> Tensor:
        """Return the exponential of the mean, a float32 scalar."""
        return super().compute().exp()


def read_dictionary(file: str | Path) -> frozenset[str]:
    """Read the words of a UTF-8 text file with one word per line.

    Raises:
        UserError: The file cannot be read, is not UTF-8 or has no words.
    """
    advice = "give --dictionary a UTF-8 text file with one word per line"
    try:
        words = frozenset(Path(file).expanduser().read_text(encoding="utf-8-sig").split())
    except OSError as error:
        raise UserError(f"The dictionary {file} cannot be read ({error.strerror}); {advice}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The dictionary {file} is not UTF-8 text; {advice}.") from error
    if not words:
        raise UserError(f"The dictionary {file} has no words; {advice}.")
    return words


def _is_special(character: str) -> bool:
    """Return whether a character is no letter, accent, digit or space."""
    return not (unicodedata.category(character)[0] in "LMN" or character.isspace())  # letters, their marks, numbers


def _load_language_model(name: str, offline: bool) -> tuple[Any, Any]:
    """Load a tokenizer and a frozen float32 model, without running code from its repository.

    Raises:
        UserError: They cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False}
    try:
        with quiet(), hub_access(offline):
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
            if len(tokenizer) <= len(
                tokenizer.all_special_ids
            ):  # transformers returns an empty one if there are no files
                raise ValueError("its tokenizer has no tokens")
            model, info = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **where
            )
        if missing := sorted(info["missing_keys"]):  # transformers would initialize these at random
            raise ValueError(f"it lacks {len(missing)} weights such as {missing[0]}")
    except Exception as error:  # the type depends on the kind of folder
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"The language model {name!r} cannot be loaded ({reason}); give --language_model a folder or hub id that "
            "holds a causal language model in safetensors and its tokenizer."
        ) from error
    return tokenizer, model.eval().requires_grad_(False)
