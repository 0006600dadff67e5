"""Synonyms and antonyms from WordNet."""

from __future__ import annotations

import io
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError

PLACES = (
    "/usr/share/wordnet",
    "/usr/local/share/wordnet",
    "/usr/local/WordNet-3.0/dict",
    "/opt/homebrew/share/wordnet/dict",
)
HINT = (
    "install Debian's package wordnet-base, run `python -m nltk.downloader wordnet`, or give its folder as "
    "--model.dictionary"
)
INSTALL = "WordNet needs nltk, which is not installed; run `pip install 'lightning-prompts[wordnet]'`."


class WordNet:
    """The WordNet database, read with nltk.

    Args:
        folder: Folder with its files, such as `data.noun`; None for the usual places.
        count: The most synonyms or antonyms of a word; those of common meanings come first.
    """

    def __init__(self, folder: str | None = None, count: int = 10) -> None:
        self.words, self.count = _reader(str(_find(folder))), count

    def synonyms(self, word: str) -> list[str]:
        """Return words that share a meaning with a word, those of the most common meaning first."""
        return self._lemmas(word, lambda lemma: [lemma])[: self.count]

    def antonyms(self, word: str) -> list[str]:
        """Return words that mean the opposite; for an adjective also the opposites of similar adjectives."""
        direct = self._lemmas(word, lambda lemma: lemma.antonyms())
        similar = [
            a for synset in self.words.synsets(word) for other in synset.similar_tos() for a in _opposites(other)
        ]
        return list(dict.fromkeys([*direct, *(_text(lemma) for lemma in similar)]))[: self.count]

    def _lemmas(self, word: str, related: Any) -> list[str]:
        texts = [
            _text(other) for synset in self.words.synsets(word) for lemma in synset.lemmas() for other in related(lemma)
        ]
        return [other for other in dict.fromkeys(texts) if other.casefold() != word.casefold()]


def _opposites(synset: Any) -> list[Any]:
    return [opposite for lemma in synset.lemmas() for opposite in lemma.antonyms()]


def _text(lemma: Any) -> str:
    return re.sub(r"_", " ", lemma.name())


def _find(folder: str | None) -> Path:
    try:
        import nltk.data
    except ModuleNotFoundError:
        raise UserError(INSTALL) from None
    if folder is not None:
        if not (Path(folder) / "data.noun").is_file():
            raise UserError(f"There is no WordNet in {folder!r} (it has no data.noun); {HINT}.")
        return Path(folder)
    downloaded = [Path(place) / "corpora" / "wordnet" for place in nltk.data.path]
    for path in (*map(Path, PLACES), *downloaded):
        if (path / "data.noun").is_file():
            return path
    raise UserError(f"WordNet is not on this machine; {HINT}.")


@cache
def _reader(folder: str) -> Any:
    """Return nltk's reader of a folder; takes seconds."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        """Read also Debian's files, which lack the list of lexicographers' files; it is not needed here."""

        def open(self, file: str) -> Any:
            if file == "lexnames" and not (Path(folder) / file).is_file():
                return io.StringIO("".join(f"{number:02d} unknown 0\n" for number in range(45)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Skip the mapping to another version of WordNet."""

    if folder not in nltk.data.path:
        nltk.data.path.append(folder)  # nltk refuses to read outside of its path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about other languages
        return Reader(folder, None)
