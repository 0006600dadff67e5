"""The CLIP of an inversion: features of images and prompts, and the words that describe the images."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lightning_prompts.backbones import Backbone
from lightning_prompts.cache import cached, fingerprint
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.runs.record import Problem
from lightning_prompts.typed_module import TypedModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SHORTLIST = 64
"""Words per image, the most similar ones on their own, that are tried at each position."""


class SearchClip(TypedModule):
    """The CLIP that takes part in a search, loaded on first use.

    Args:
        name: Folder or hub id of the CLIP.
        prompt: The prompts that it encodes.
        offline: Do not connect to the hub.
        weight: Weight of the CLIP loss.
        refusal: Error to raise if the CLIP has no gradient for the embeddings; None where the search does not need one.
    """

    def __init__(
        self, name: str, prompt: TokenEmbeddings, offline: bool, weight: float, refusal: UserError | None
    ) -> None:
        super().__init__()
        self.name, self.prompt, self.offline, self.weight, self.refusal = name, prompt, offline, weight, refusal
        self._model = cast("ClipSimilarity | None", None)
        self._words: Tensor | None = None  # features (A, E) of the allowed tokens alone
        self._image_features: dict[str, Tensor] = {}  # of each problem's images, by key

    @property
    def model(self) -> ClipSimilarity:
        """Return the CLIP that searches."""
        if self._model is None:
            model = ClipSimilarity(self.name, self.offline)
            self.reads_text = not reads_tokens(model, self.prompt)
            self.differentiable = not self.reads_text and model.width in self.prompt.vocabulary.widths
            if self.refusal and not self.differentiable:
                raise self.refusal
            if self.weight and not self.differentiable:
                log.info(
                    "The CLIP %r has no embeddings for the searched tokens: its loss compares candidates, and only the "
                    "denoising loss has a gradient that proposes them.",
                    self.name,
                )
            self._model = model.to(self.prompt.table.device)
        return self._model

    def image_features(self, problem: Problem, data: ImagesToPrompts) -> Tensor:
        """Return the mean features (E,) of a problem's images, computed once."""
        if problem.key not in self._image_features:
            (images,) = data.target_images([problem])
            self._image_features[problem.key] = self.model.features(images).mean(0)
        return self._image_features[problem.key]

    def evict(self, problem: Problem) -> None:
        """Forget the features of a problem that left the batch."""
        self._image_features.pop(problem.key, None)

    def text_features(self, token_ids: Tensor) -> Tensor:
        """Encode prompts (B, m) in their template to unit vectors (B, E), without a gradient."""
        model = self.model  # sets `reads_text`
        return prompt_features(model, self.prompt, token_ids, self.reads_text)

    def loss(self, ids: Tensor, embeddings: Tensor, features: Tensor) -> Tensor:
        """Compute one minus the cosine (Q,) of prompts and images; without a gradient if the CLIP reads text.

        Args:
            ids: Token ids, (Q, L).
            embeddings: Embeddings in place of the tokens', (Q, L, D).
            features: Mean features of each problem's images, (Q, E).
        """
        model = self.model
        if self.differentiable:
            return cast("Tensor", model(ids, self.prompt.vocabulary.of_width(embeddings, model.width), features))
        return 1 - (self.text_features(ids[:, self.prompt.positions]) * features).sum(1)

    def words(self, features: Tensor, beams: int) -> Tensor:
        """Return the tokens (Q, M) that are most similar to image features (Q, E); see `best_words`."""
        model = self.model
        if self._words is None:
            self._words = word_features(model, self.prompt, self.reads_text)
        return best_words(model, self.prompt, features, beams, words=self._words)


def missing_gradient(method: str, clip: str, backbone: Backbone, moves_embeddings: bool) -> UserError:
    """Return the error of a method that needs the gradient of the CLIP loss with a CLIP that has none.

    Args:
        method: Class of the method.
        clip: Folder or hub id of the CLIP.
        backbone: The model.
        moves_embeddings: Whether the method needs the gradient of the whole loss, even with a denoising loss.

    Raises:
        UserError: No CLIP has this gradient, since tokens of another kind of text encoder are searched.
    """
    kind, instead = backbone.vocabulary.text_encoders[0].kind, ""
    if kind != "clip" and any(encoder.kind == "clip" for encoder in backbone.text_encoders):
        instead = ", or search the CLIP encoder's tokens with --model.backbone.vocabulary clip"
    way_out = "give --model.loss_weights.clip 0" if moves_embeddings else "give --model.loss_weights.denoising above 0"
    instead = way_out + instead
    if kind == "clip":
        instead += ", or name the CLIP that this text encoder was taken from as --model.clip"
    error = UserError(
        f"{method} needs the gradient of the CLIP loss, and the CLIP {clip!r} does not have the token embeddings of "
        f"the model's {kind.upper()} text encoder; {instead}."
    )
    if kind != "clip":
        raise error
    return error


def reads_tokens(clip: ClipSimilarity, prompt: TokenEmbeddings) -> bool:
    """Return whether a CLIP has the vocabulary of the prompts, so that it can encode their token ids."""
    used = torch.cat([prompt.allowed.nonzero().squeeze(1), prompt.template]).unique()
    return clip.has_same_tokens(prompt.vocabulary.tokenizer, used)


@torch.no_grad()
def prompt_features(
    clip: ClipSimilarity, prompt: TokenEmbeddings, token_ids: Tensor, as_text: bool, chunk: int = 256
) -> Tensor:
    """Encode prompts in their template with a CLIP.

    Args:
        clip: The CLIP.
        prompt: The template.
        token_ids: Token ids of B prompts of m tokens, (B, m).
        as_text: Decode the tokens and let the CLIP's own tokenizer encode the text, for a CLIP with another vocabulary.
        chunk: Prompts per call.

    Returns:
        Unit vectors, (B, E).
    """
    if as_text:
        texts = prompt.texts(token_ids)
        return torch.cat([clip.features_of(texts[i : i + chunk]) for i in range(0, len(texts), chunk)])
    return torch.cat([clip.text_features(part) for part in prompt.ids(token_ids).split(chunk)])


def word_features(clip: ClipSimilarity, prompt: TokenEmbeddings, as_text: bool, chunk: int = 256) -> Tensor:
    """Encode each allowed token alone in the template: unit vectors (A, E) in the order of `prompt.allowed.nonzero()`.

    The features of the whole vocabulary are computed once per CLIP, vocabulary and template, and cached on disk. With a
    list of allowed words, only these are encoded.
    """
    allowed = prompt.allowed.nonzero()
    if prompt.listed:
        return prompt_features(clip, prompt, allowed, as_text, chunk)
    every = prompt.vocabulary.allowed().to(allowed.device).nonzero() if prompt.banned_words else allowed
    tokenizers = [clip.tokenizer, prompt.vocabulary.tokenizer] if as_text else []
    depends_on = {
        "clip": fingerprint(clip.clip.text_model) + fingerprint(clip.clip.text_projection),
        "template": f"{prompt.positions[0]} {prompt.ids(every[:1]).tolist()}",
        "tokens": hashlib.blake2b(every.cpu().numpy().tobytes(), digest_size=16).hexdigest(),
        "tokenizers": " ".join(_digest(tokenizer) for tokenizer in tokenizers),
        "device": allowed.device.type,  # devices round differently
    }
    features = cached("words", depends_on, lambda: prompt_features(clip, prompt, every, as_text, chunk))
    kept = torch.isin(every, allowed).squeeze(1)
    return features.to(allowed.device)[kept]


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that determines a tokenizer's output."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()


@torch.no_grad()
def best_words(
    clip: ClipSimilarity,
    prompt: TokenEmbeddings,
    features: Tensor,
    beams: int = 1,
    chunk: int = 256,
    words: Tensor | None = None,
) -> Tensor:
    """Build prompts word by word, each time adding the word that raises the cosine most, and no word twice.

    Args:
        clip: The CLIP; one with another vocabulary than the prompt's encodes the decoded text.
        prompt: The allowed tokens and the template.
        features: Mean features of each problem's images, (P, E).
        beams: Prompts to keep at each length; 1 is greedy.
        chunk: Prompts per call of the CLIP.
        words: Features (A, E) of the allowed tokens alone, see `word_features`; None to compute them.

    Returns:
        Token ids, (P, M).
    """
    allowed, as_text = prompt.allowed.nonzero().squeeze(1), not reads_tokens(clip, prompt)

    def cosines(prompts: Tensor) -> Tensor:
        """Compute the cosines (P, B) of the images and B prompts of m words each, (P, B, m)."""
        text = prompt_features(clip, prompt, prompts.flatten(0, 1), as_text, chunk)
        return torch.bmm(text.view(*prompts.shape[:2], -1), features.unsqueeze(2)).squeeze(2)

    words = word_features(clip, prompt, as_text, chunk) if words is None else words
    score, best = (features @ words.T).topk(min(SHORTLIST, len(allowed)))
    shortlist = allowed[best]  # (P, S)
    chosen, score = shortlist[:, :beams].unsqueeze(2), score[:, :beams]
    for _ in range(1, len(prompt.positions)):
        longer = torch.cat(  # each beam with each word of the shortlist, (P, W, S, m + 1)
            [
                chosen.unsqueeze(2).expand(-1, -1, shortlist.shape[1], -1),
                shortlist[:, None, :, None].expand(-1, chosen.shape[1], -1, -1),
            ],
            dim=3,
        ).flatten(1, 2)
        ordered = longer.sort(2).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]).sum(2)
        score = cosines(longer) - 4 * repeated  # a vocabulary shorter than the prompt still fills it
        score, kept = score.topk(min(beams, longer.shape[1]))
        chosen = longer.gather(1, kept.unsqueeze(2).expand(-1, -1, longer.shape[2]))
    return chosen[:, 0]
