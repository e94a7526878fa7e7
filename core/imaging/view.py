"""View: from which side the X-ray was taken, by words, codes and directions."""

from collections.abc import Collection

from pydicom.dataset import Dataset

from lungwatch.errors import FileRejected, Reason
from lungwatch.flags import Flag
from lungwatch.imaging.attributes import code_of, codes_of, items_of, short
from lungwatch.imaging.orientation import directions_of
from lungwatch.imaging.vocabulary import Lexicon, fold, is_listed, readings, vocabulary

FRONTAL, DECUBITUS, NOT_FRONTAL, UNKNOWN = "frontal", "decubitus", "not_frontal", ""
# Patient Position (0018,5100) of who lies on the side (PS3.3 C.7.3.1.1.2).
_ON_THE_SIDE = {"HFDL", "HFDR", "FFDL", "FFDR"}
_CORES = ("PA", "AP")


def check_view(
    dataset: Dataset, accepted: Collection[str], *, refuse: bool = True
) -> tuple[Flag, ...]:
    """Refuse views that are not frontal.

    View Position (0018,5101), the View Code Sequence (0054,0220) and Patient Orientation
    (0020,0020) say the same in three ways (PS3.3 C.8.1.3, C.8.11.5, C.7.6.1.1.1). Frontal views
    are known by what they are called; a position that is not on that list is not frontal.

    Parameters
    ----------
    accepted
        Further spellings that are taken for a frontal view (`ReadPolicy.view_positions`).
    refuse
        False lets every view pass; the flags are the same.

    Returns
    -------
    tuple of Flag
        `VIEW_UNKNOWN` where nothing names a view, `DECUBITUS` where the patient lay on the side.

    Raises
    ------
    FileRejected
        `NOT_FRONTAL`, with what says so.
    """
    stated = code_of(dataset, "ViewPosition")
    is_accepted = bool(stated) and is_listed(stated, accepted)
    by_name = FRONTAL if is_accepted else view_of(*readings(dataset, "ViewPosition"))
    by_code = [
        FRONTAL if meaning and is_listed(meaning.upper(), accepted) else _of_code(value, meaning)
        for value, meaning in codes_of(dataset, "ViewCodeSequence")
    ]
    views = [by_name, *by_code, *_modifiers(dataset)]
    if refuse and by_name == NOT_FRONTAL:
        raise FileRejected(Reason.NOT_FRONTAL, f"view position {short(stated)} is not frontal")
    if refuse and NOT_FRONTAL in views:
        raise FileRejected(Reason.NOT_FRONTAL, "the view's code is not that of a frontal view")
    if refuse and codes_of(dataset, "ProjectionEponymousNameCodeSequence"):
        # CID 4012: Lindblom, Twining, Waters and others, none of which is an ordinary PA or AP.
        raise FileRejected(Reason.NOT_FRONTAL, "the projection has a name of its own")
    directions = directions_of(dataset)
    if refuse and directions is not None and set("AP") & set(directions):
        raise FileRejected(
            Reason.NOT_FRONTAL,
            f"rows and columns run {' and '.join(directions)}, as they do in no frontal view",
        )
    if DECUBITUS in views or code_of(dataset, "PatientPosition") in _ON_THE_SIDE:
        return (Flag.DECUBITUS,)
    return () if FRONTAL in views else (Flag.VIEW_UNKNOWN,)


def view_of(*texts: str) -> str:
    """Name the view that a text means, by what is allowed.

    Parameters
    ----------
    texts
        What the text may be, where its character set is uncertain; the first that is known counts.

    Returns
    -------
    str
        "frontal", "decubitus" (on the side, frontal all the same), "not_frontal", or "" where no
        view is named.
    """
    views = [_view_of(text) for text in texts]
    known = (view for view in views if view != NOT_FRONTAL)
    return next(known, views[0] if views else UNKNOWN)


def _view_of(text: str) -> str:
    lexicon = vocabulary().views
    text = _apart(text, lexicon)
    found = lexicon.look_up(text)
    kinds = set(found.kinds)
    rest = " ".join(found.rest)
    # "CHEST PA": the part's name is no view.
    if rest and not vocabulary().body_parts.look_up(rest).rest:
        rest = "" if _is_chest_only(rest) else rest
    if rest or "not_frontal" in kinds:
        return NOT_FRONTAL
    if "lying" in kinds and FRONTAL not in kinds:
        return NOT_FRONTAL
    for kind in (DECUBITUS, FRONTAL):
        if kind in kinds:
            return kind
    return UNKNOWN


def _is_chest_only(text: str) -> bool:
    return vocabulary().body_parts.look_up(text).kinds <= {"chest", "chest_adjective"}


def _apart(text: str, lexicon: Lexicon) -> str:
    """Set apart what is written as one word ("APSUPINE")."""
    words = []
    for word in fold(text):
        for core in _CORES:
            rest = word.removeprefix(core)
            if rest not in ("", word) and not lexicon.look_up(rest).rest:
                words += [core, rest]
                break
        else:
            words.append(word)
    return " ".join(words)


def _of_code(value: str, meaning: str) -> str:
    known = vocabulary().view_codes.get(value)
    by_meaning = view_of(meaning)
    if known is None:
        return by_meaning
    # A code of one view with the name of another: the name is what somebody reads and chooses.
    clash = "not_frontal" in vocabulary().views.look_up(meaning).kinds
    return NOT_FRONTAL if known == FRONTAL and clash else known


def _modifiers(dataset: Dataset) -> list[str]:
    """Return what modifiers make of a view: lordotic, crosstable, decubitus. Others are silent."""
    items = items_of(dataset, "ViewCodeSequence")
    codes = [code for item in items for code in codes_of(item, "ViewModifierCodeSequence")]
    codes += codes_of(dataset, "PatientOrientationModifierCodeSequence")
    views = []
    for value, meaning in codes:
        kinds = vocabulary().views.look_up(meaning).kinds
        named = next((kind for kind in (DECUBITUS, NOT_FRONTAL) if kind in kinds), UNKNOWN)
        views.append(vocabulary().view_codes.get(value, named))
    # Frontal is the view's to say.
    return [view for view in views if view != FRONTAL]
