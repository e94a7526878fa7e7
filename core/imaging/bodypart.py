"""Body part: what Body Part Examined and the region's codes say is shown."""

from collections.abc import Collection

from pydicom.dataset import Dataset

from lungwatch.errors import FileRejected, Reason
from lungwatch.flags import Flag
from lungwatch.imaging.attributes import code_of, codes_of, short
from lungwatch.imaging.vocabulary import is_listed, readings, vocabulary

CHEST, PARTLY, UNKNOWN = "chest", "partly_chest", ""
# Kinds of words that name no part of the body.
_SILENT = {"ignored"}


def check_body_part(dataset: Dataset, accepted: Collection[str]) -> tuple[Flag, ...]:
    """Refuse what is known not to be the chest.

    Body Part Examined (0018,0015) and the Anatomic Region Sequence (0008,2218) say the same in
    words and in code (PS3.3 C.8.11.2, 10.5); a file may have either, both or none. What one of
    them names as something else is refused, whatever the other says.

    Parameters
    ----------
    accepted
        Further spellings that are taken for the chest (`ReadPolicy.body_parts`), in capitals.

    Returns
    -------
    tuple of Flag
        `BODY_PART_UNKNOWN` where nothing names the chest, or where it is one among others.

    Raises
    ------
    FileRejected
        `WRONG_BODY_PART`, with the part's name.
    """
    stated = code_of(dataset, "BodyPartExamined")
    if stated and is_listed(stated, accepted):
        return ()
    by_name = part_of(*readings(dataset, "BodyPartExamined"))
    if by_name not in (CHEST, PARTLY, UNKNOWN):
        raise FileRejected(Reason.WRONG_BODY_PART, f"body part {short(stated)} is not the chest")
    parts = {by_name}
    for keyword in ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence"):
        for value, meaning in codes_of(dataset, keyword):
            parts.add(vocabulary().body_part_codes.get(value) or part_of(meaning))
    if parts - {CHEST, PARTLY, UNKNOWN}:
        raise FileRejected(Reason.WRONG_BODY_PART, "the region's code is not that of the chest")
    if CHEST in parts and PARTLY not in parts:
        return ()
    return (Flag.BODY_PART_UNKNOWN,)


def part_of(*texts: str) -> str:
    """Name the part of the body that a text means.

    Parameters
    ----------
    texts
        What the text may be, where its character set is uncertain; the first that is known counts.

    Returns
    -------
    str
        "chest"; "partly_chest" where it is one part among others; the name of another part; or ""
        where no word is known.
    """
    words = vocabulary().body_parts
    for look_up in (words.look_up, words.look_up_damaged):
        for text in texts:
            kinds = look_up(text).kinds - _SILENT
            others = sorted(kinds - {CHEST, PARTLY, "chest_adjective"})
            if CHEST in kinds:
                return PARTLY if others or PARTLY in kinds else CHEST
            # "Thoracic" alone is the chest; with "spine" it is the spine.
            if others:
                return PARTLY if PARTLY in kinds else others[0]
            if kinds:
                return PARTLY if PARTLY in kinds else CHEST
    return UNKNOWN
