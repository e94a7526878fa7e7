"""Text from outside, made harmless for people's eyes: terminals, spreadsheets, reports."""

import unicodedata


def visible(text: str) -> str:
    r"""Return text in which nothing steers what shows it, on one line.

    Control characters, line and paragraph separators, characters that turn the direction of
    the text or have no width, and bytes that are no UTF-8 become escapes, as in ``\x1b``.
    Letters, signs and spaces of any script stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char if _is_harmless(char) else char.encode("unicode_escape").decode() for char in text
    )


def _is_harmless(char: str) -> bool:
    # The wide space of Japanese names, for one, is not "printable".
    return char.isprintable() or unicodedata.category(char) == "Zs"
