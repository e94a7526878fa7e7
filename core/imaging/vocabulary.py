"""Vocabulary of what files show: body parts, views and species, in words and codes.

The words are in `vocabulary.toml`, in the languages in which files really name them.
"""

import re
import tomllib
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from pydicom.charset import convert_encodings
from pydicom.dataset import Dataset

from lungwatch.imaging.radiograph import text_of

# From here on (CJK radicals, kana, Han, Hangul, and Thai) words are not set apart by spaces.
_UNSPACED = re.compile("[\u0e00-\u0e7f\u2e80-\ud7ff\uf900-\ufaff]")
_LETTERS = re.compile(r"[^\W\d_]+")
# Letters without a decomposition, as they are written on keyboards that lack them.
_PLAIN = str.maketrans({"Ł": "L", "Ø": "O", "Đ": "D", "Æ": "AE", "Œ": "OE", "Þ": "TH"})
# A word that lost its accented letters is recognised by at least so many others.
_FEWEST_LETTERS = 4
# Descriptions have at most 64 characters (PS3.5 6.2, VR LO).
_MOST_CHARACTERS = 256


def fold(text: str) -> tuple[str, ...]:
    """Split a text into words, without case, accents, punctuation and digits."""
    upper = text.upper().translate(_PLAIN)
    bare = "".join(c for c in unicodedata.normalize("NFKD", upper) if not _is_mark(c))
    return tuple(_LETTERS.findall(unicodedata.normalize("NFC", bare)))


def is_listed(text: str, words: Collection[str]) -> bool:
    """Return whether a text is one of some words, as it stands or folded."""
    folded = fold(text)
    return text in words or (bool(folded) and any(folded == fold(word) for word in words))


def readings(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    """Return possible readings of an attribute's text, the likeliest first; none if it is empty.

    pydicom reads a code string (VR CS) as Latin-1; files hold UTF-8 or their own character set.
    """
    text = text_of(dataset, keyword)
    if text is None:
        return ()
    found = [text]
    try:
        raw = text.encode("latin-1")
    except UnicodeEncodeError:
        return (text,)
    if not raw.isascii():
        stated = dataset.get("SpecificCharacterSet")
        for encoding in ("utf-8", *_encodings(stated)):
            try:
                found.append(raw.decode(encoding))
            except (UnicodeDecodeError, LookupError):
                continue
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Found:
    """Meaning of a text: lists of the vocabulary that hold its words, and words of no list."""

    kinds: frozenset[str]
    rest: tuple[str, ...]


class Lexicon:
    """Lists of words, by their meaning."""

    def __init__(self, lists: Mapping[str, Iterable[str]]) -> None:
        self._entries = sorted(
            {(_words(entry), kind) for kind, entries in lists.items() for entry in entries},
            key=lambda entry: (-len(entry[0]), -sum(len(w.strip("*")) for w in entry[0]), entry),
        )
        # Entries by how their first word begins, "" where that may be anything.
        self._by_initial: dict[str, list[int]] = {}
        for number, ((first, *_), _) in enumerate(self._entries):
            is_inside = first.startswith("*") or _UNSPACED.search(first)
            self._by_initial.setdefault("" if is_inside else first[0], []).append(number)
        self._lost = [
            (pattern, kind)
            for kind, entries in lists.items()
            for entry in entries
            if (pattern := _without_accents(entry)) is not None
        ]

    def look_up(self, text: str) -> Found:
        """Return a text's meaning, whatever the order of words; the longest entries count first."""
        left = list(fold(text[:_MOST_CHARACTERS]))
        kinds = set()
        initials = {"", *(word[0] for word in left)}
        for number in sorted(n for i in initials for n in self._by_initial.get(i, ())):
            words, kind = self._entries[number]
            if len(words) > len(left):
                continue
            remaining: list[str] | None = left
            for word in words:
                remaining = _without(remaining, word) if remaining is not None else None
            if remaining is not None:
                kinds.add(kind)
                left = remaining
        return Found(kinds=frozenset(kinds), rest=tuple(left))

    def look_up_damaged(self, text: str) -> Found:
        """Return the meaning of a text that lost its accented letters ("T?RAX")."""
        words = fold(text[:_MOST_CHARACTERS])
        joined = " ".join(words)
        kinds = frozenset(kind for pattern, kind in self._lost if pattern.search(joined))
        return Found(kinds=kinds, rest=() if kinds else words)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Content of `vocabulary.toml`.

    Attributes
    ----------
    body_parts
        Kinds "chest", "chest_adjective", "partly_chest", "ignored", and the parts elsewhere.
    views, species, image_types
        Kinds as the lists in the file are named.
    body_part_codes, view_codes
        Meanings by code value.
    human_codes, film_conversions
        Codes of Homo sapiens; values of Conversion Type that a radiograph may have.
    """

    body_parts: Lexicon
    views: Lexicon
    species: Lexicon
    image_types: Lexicon
    body_part_codes: Mapping[str, str]
    view_codes: Mapping[str, str]
    human_codes: frozenset[str]
    film_conversions: frozenset[str]


@cache
def vocabulary() -> Vocabulary:
    """Return the vocabulary that comes with the package."""
    text = resources.files(__package__).joinpath("vocabulary.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    parts = data["body_part"]
    return Vocabulary(
        body_parts=Lexicon(_lists(parts) | _lists(parts["elsewhere"])),
        views=Lexicon(_lists(data["view"])),
        species=Lexicon(_lists(data["species"])),
        image_types=Lexicon(_lists(data["image_type"])),
        body_part_codes=_codes(parts["codes"]),
        view_codes=_codes(data["view"]["codes"]),
        human_codes=frozenset(data["species"]["codes"]["human"]),
        film_conversions=frozenset(data["conversion"]["film"]),
    )


def says_nothing(text: str) -> bool:
    """Return whether a text is empty, or a word for that ("UNKNOWN", "N/A")."""
    found = vocabulary().views.look_up(text)
    return not found.rest and found.kinds <= {"unstated"}


def _lists(table: dict[str, Any]) -> dict[str, list[str]]:
    return {name: value for name, value in table.items() if isinstance(value, list)}


def _codes(table: dict[str, list[str]]) -> dict[str, str]:
    return {code: kind for kind, codes in table.items() for code in codes}


def _encodings(stated: object) -> list[str]:
    try:
        return list(convert_encodings(stated)) if stated else []  # type: ignore[arg-type]
    # pydicom may raise anything on a damaged value.
    except Exception:
        return []


def _is_mark(character: str) -> bool:
    return unicodedata.combining(character) != 0 or unicodedata.category(character) == "Mn"


def _words(entry: str) -> tuple[str, ...]:
    """Return an entry's folded words, with their stars."""
    words = []
    for word in entry.split():
        head, tail = "*" * word.startswith("*"), "*" * word.endswith("*")
        words.append(head + "".join(fold(word)) + tail)
    return tuple(words)


def _without(words: list[str], pattern: str) -> list[str] | None:
    """Return the words without the first that fits, None if none does."""
    core = pattern.strip("*")
    for index, word in enumerate(words):
        if _UNSPACED.search(core):
            if core in word:
                rest = [part for part in word.split(core, 1) if part]
                return [*words[:index], *rest, *words[index + 1 :]]
        elif (
            word == core
            or (pattern.endswith("*") and word.startswith(core))
            or (pattern.startswith("*") and word.endswith(core))
        ):
            return [*words[:index], *words[index + 1 :]]
    return None


def _without_accents(entry: str) -> re.Pattern[str] | None:
    """Return a pattern of an entry whose accented letters are lost or garbled."""
    stem = entry.strip("*")
    letters = [c if c.isascii() else None for c in stem]
    if None not in letters or _UNSPACED.search(stem) or " " in stem:
        return None
    if sum(c is not None for c in letters) < _FEWEST_LETTERS:
        return None
    # A lost letter leaves a gap, or up to two letters of a wrong character set.
    body = "".join(r"[^ ]{0,2} ?" if c is None else re.escape(c) for c in letters)
    return re.compile(rf"(?<![^ ]){body}" + ("" if entry.endswith("*") else r"(?![^ ])"))
