"""Subject: what a DICOM file says it shows, which must be a frontal view of a human chest."""

from collections.abc import Collection

from pydicom import config
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    MediaStorageDirectoryStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from lungwatch.errors import FileRejected, Flag, Reason
from lungwatch.imaging.geometry import directions_of
from lungwatch.imaging.radiograph import (
    ReadPolicy,
    code_of,
    codes_of,
    items_of,
    short,
    text_of,
    values_of,
)
from lungwatch.imaging.vocabulary import (
    Lexicon,
    fold,
    is_listed,
    readings,
    says_nothing,
    vocabulary,
)

CHEST, PARTLY, NO_PART = "chest", "partly_chest", ""
# Kinds of words that name no part of the body.
_SILENT = {"ignored"}


def check_body_part(dataset: Dataset, accepted: Collection[str]) -> tuple[Flag, ...]:
    """Refuse body parts other than the chest, and flag those that are not certain.

    Body Part Examined (0018,0015) and the Anatomic Region Sequence (0008,2218) state the same in
    words and in codes (PS3.3 C.8.11.2, 10.5); a file may have either, both or none. If one of them
    names another part, the file is refused.

    Parameters
    ----------
    accepted
        Further spellings of the chest (`ReadPolicy.body_parts`), in capitals.

    Returns
    -------
    tuple of Flag
        `BODY_PART_UNKNOWN` where nothing names the chest, or names it among others.

    Raises
    ------
    FileRejected
        `WRONG_BODY_PART`, with the part's name.
    """
    stated = code_of(dataset, "BodyPartExamined")
    if stated and is_listed(stated, accepted):
        return ()
    by_name = part_of(*readings(dataset, "BodyPartExamined"))
    if by_name not in (CHEST, PARTLY, NO_PART):
        raise FileRejected(Reason.WRONG_BODY_PART, f"body part {short(stated)} is not the chest")
    parts = {by_name}
    for keyword in ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence"):
        for value, meaning in codes_of(dataset, keyword):
            parts.add(vocabulary().body_part_codes.get(value) or part_of(meaning))
    if parts - {CHEST, PARTLY, NO_PART}:
        raise FileRejected(Reason.WRONG_BODY_PART, "the region's code is not that of the chest")
    if CHEST in parts and PARTLY not in parts:
        return ()
    return (Flag.BODY_PART_UNKNOWN,)


def part_of(*texts: str) -> str:
    """Return the body part that a text names, by the first known of its `readings`.

    "chest"; "partly_chest" for one part among others; the name of another part; or "" where no
    word is known.
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
    return NO_PART


FRONTAL, DECUBITUS, NOT_FRONTAL, NO_VIEW = "frontal", "decubitus", "not_frontal", ""
# Patient Position (0018,5100) of who lies on the side (PS3.3 C.7.3.1.1.2).
_ON_THE_SIDE = {"HFDL", "HFDR", "FFDL", "FFDR"}
_CORES = ("PA", "AP")


def check_view(
    dataset: Dataset, accepted: Collection[str], *, refuse: bool = True
) -> tuple[Flag, ...]:
    """Refuse views that are not frontal.

    View Position (0018,5101), the View Code Sequence (0054,0220) and Patient Orientation
    (0020,0020) state the same in three ways (PS3.3 C.8.1.3, C.8.11.5, C.7.6.1.1.1). A view position
    that is not on the list of frontal ones is not frontal.

    Parameters
    ----------
    accepted
        Further spellings of a frontal view (`ReadPolicy.view_positions`).
    refuse
        False accepts every view; the flags are the same.

    Returns
    -------
    tuple of Flag
        `VIEW_UNKNOWN` where nothing names a view, `DECUBITUS` where the patient lay on the side.

    Raises
    ------
    FileRejected
        `NOT_FRONTAL`, with the attribute.
    """
    stated = code_of(dataset, "ViewPosition")
    is_accepted = bool(stated) and is_listed(stated, accepted)
    by_name = FRONTAL if is_accepted else view_of(*readings(dataset, "ViewPosition"))
    by_code = [
        FRONTAL
        if meaning and is_listed(meaning.upper(), accepted)
        else _view_of_code(value, meaning)
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
    """Return the view that a text names, by the first known of its `readings`.

    "frontal", "decubitus" (lying on the side, but frontal), "not_frontal", or "" where no view is
    named.
    """
    views = [_view_of(text) for text in texts]
    known = (view for view in views if view != NOT_FRONTAL)
    return next(known, views[0] if views else NO_VIEW)


def _view_of(text: str) -> str:
    lexicon = vocabulary().views
    text = _apart(text, lexicon)
    found = lexicon.look_up(text)
    kinds = set(found.kinds)
    rest = " ".join(found.rest)
    # "CHEST PA": the name of the part is not a view.
    if rest and not vocabulary().body_parts.look_up(rest).rest:
        rest = "" if _is_chest_only(rest) else rest
    if rest or "not_frontal" in kinds:
        return NOT_FRONTAL
    if "lying" in kinds and FRONTAL not in kinds:
        return NOT_FRONTAL
    for kind in (DECUBITUS, FRONTAL):
        if kind in kinds:
            return kind
    return NO_VIEW


def _is_chest_only(text: str) -> bool:
    return vocabulary().body_parts.look_up(text).kinds <= {"chest", "chest_adjective"}


def _apart(text: str, lexicon: Lexicon) -> str:
    """Split views that are written as one word ("APSUPINE")."""
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


def _view_of_code(value: str, meaning: str) -> str:
    known = vocabulary().view_codes.get(value)
    by_meaning = view_of(meaning)
    if known is None:
        return by_meaning
    # A code of one view with the name of another: people read and choose the name.
    clash = "not_frontal" in vocabulary().views.look_up(meaning).kinds
    return NOT_FRONTAL if known == FRONTAL and clash else known


def _modifiers(dataset: Dataset) -> list[str]:
    """Return the views of modifiers: lordotic, crosstable, decubitus. Others say nothing."""
    items = items_of(dataset, "ViewCodeSequence")
    codes = [code for item in items for code in codes_of(item, "ViewModifierCodeSequence")]
    codes += codes_of(dataset, "PatientOrientationModifierCodeSequence")
    views = []
    for value, meaning in codes:
        kinds = vocabulary().views.look_up(meaning).kinds
        named = next((kind for kind in (DECUBITUS, NOT_FRONTAL) if kind in kinds), NO_VIEW)
        views.append(vocabulary().view_codes.get(value, named))
    return [view for view in views if view != FRONTAL]


_RADIOGRAPH_CLASSES = {
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
}
_CAPTURE_CLASSES = {
    SecondaryCaptureImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
}
# Root of the UIDs of the standard (PS3.5 9.1).
_STANDARD_ROOT = "1.2.840.10008."
_PROJECTION_MODALITIES = {"CR", "DX", "RG"}
# Stated for animals only (PS3.3 C.7.1.1).
_OWNER_ROLES = {"OWNER", "VETERINARIAN"}
_NEUTERED = {"ALTERED", "UNALTERED"}
_DESCRIPTIONS = (
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "PerformedProcedureStepDescription",
    "RequestedProcedureDescription",
    "PerformedProcedureTypeDescription",
    "ScheduledProcedureStepDescription",
    "AcquisitionProtocolName",
    "AcquisitionDeviceProcessingDescription",
    "ViewName",
    "ImageComments",
)
_DESCRIPTION_CODES = (
    "ProcedureCodeSequence",
    "RequestedProcedureCodeSequence",
    "PerformedProtocolCodeSequence",
    "ScheduledProtocolCodeSequence",
    "SeriesDescriptionCodeSequence",
)
# The request holds descriptions as well (PS3.3 10.6).
_REQUEST = "RequestAttributesSequence"


def check_subject(dataset: Dataset, policy: ReadPolicy) -> tuple[Flag, ...]:
    """Refuse a file whose attributes state that it is not a frontal chest radiograph.

    Returns
    -------
    tuple of Flag
        Unknown view or body part, decubitus, contradicting descriptions.

    Raises
    ------
    FileRejected
        With the first of these that applies: another modality or class of image, another
        species, another body part, another view, raw detector values.
    """
    modality = code_of(dataset, "Modality")
    sop_class = text_of(dataset, "SOPClassUID")
    if not modality and sop_class not in _RADIOGRAPH_CLASSES:
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, "the file names neither a modality nor a radiograph's class"
        )
    if modality and modality not in policy.modalities:
        wanted = ", ".join(sorted(policy.modalities))
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, f"modality {short(modality)} is not a radiograph ({wanted})"
        )
    _check_species(dataset)
    if not modality or modality in _PROJECTION_MODALITIES:
        _check_class(dataset, modality, sop_class)
        _check_image_type(dataset, sop_class)
    flags = (
        *check_body_part(dataset, policy.body_parts),
        *check_view(dataset, policy.view_positions, refuse=policy.reject_lateral),
    )
    _check_intent(dataset, sop_class)
    if Flag.DECUBITUS not in flags and _describes(dataset, "decubitus"):
        flags = (*flags, Flag.DECUBITUS)
    return (*flags, Flag.DESCRIPTION_DISAGREES) if _description_disagrees(dataset) else flags


def check_not_directory(dataset: Dataset) -> None:
    """Refuse a DICOMDIR, the index of a CD or folder: its files are read one by one.

    Raises
    ------
    FileRejected
        If the file is a media storage directory (PS3.3 F).
    """
    meta = getattr(dataset, "file_meta", Dataset())
    stated = text_of(meta, "MediaStorageSOPClassUID") or text_of(dataset, "SOPClassUID")
    if stated == MediaStorageDirectoryStorage or "DirectoryRecordSequence" in dataset:
        raise FileRejected(
            Reason.MEDIA_DIRECTORY,
            "a DICOMDIR lists images and holds none; the images beside it are read by themselves",
        )


def _check_species(dataset: Dataset) -> None:
    """Refuse animals, by species, breed, owner, castration or quadruped directions.

    Patient Species Description is only present where the Code Sequence is not (PS3.3 C.7.1.1).
    """
    known = vocabulary()
    stated = [("", text) for text in readings(dataset, "PatientSpeciesDescription")[:1]]
    for value, meaning in (*codes_of(dataset, "PatientSpeciesCodeSequence"), *stated):
        found = known.species.look_up(meaning)
        is_unstated = not value and says_nothing(meaning)
        is_human = value in known.human_codes or "human" in found.kinds
        if not is_unstated and (not is_human or "not_human" in found.kinds):
            raise FileRejected(Reason.NOT_HUMAN, "the file names a species other than human")
    breed = next(iter(readings(dataset, "PatientBreedDescription")), "")
    has_breed = bool(codes_of(dataset, "PatientBreedCodeSequence")) or (
        not says_nothing(breed) and "human" not in known.species.look_up(breed).kinds
    )
    if (
        has_breed
        or code_of(dataset, "ResponsiblePersonRole") in _OWNER_ROLES
        or code_of(dataset, "PatientSexNeutered") in _NEUTERED
        or code_of(dataset, "AnatomicalOrientationType") == "QUADRUPED"
    ):
        raise FileRejected(Reason.NOT_HUMAN, "the file describes its patient as an animal")


def _check_class(dataset: Dataset, modality: str, sop_class: str | None) -> None:
    """Refuse images whose SOP class is not that of a radiograph, whatever their modality.

    A Secondary Capture may be a digitised film, or an exported radiograph that still states body
    part and view; a workstation's screenshot states neither. Private classes and files without one
    pass.
    """
    is_standard = sop_class is not None and sop_class.startswith(_STANDARD_ROOT)
    if not sop_class or not is_standard or sop_class in _RADIOGRAPH_CLASSES:
        return
    if sop_class not in _CAPTURE_CLASSES:
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH,
            f"the file is of class {UID(sop_class, config.IGNORE).name}, not a radiograph's",
        )
    if modality == "DX":
        # DX images are of the DX classes (PS3.3 A.26).
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, "the file is a secondary capture that calls itself DX"
        )
    if code_of(dataset, "ConversionType") in vocabulary().film_conversions:
        return
    is_chest = part_of(*readings(dataset, "BodyPartExamined")) == CHEST
    if not is_chest or view_of(*readings(dataset, "ViewPosition")) != FRONTAL:
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH,
            "the file is a secondary capture that does not name a frontal chest",
        )


def _check_image_type(dataset: Dataset, sop_class: str | None) -> None:
    r"""Refuse derived images: results, localizers, energy subtraction, quality control.

    Image Type (0008,0008): value 1 is ORIGINAL or DERIVED, value 2 PRIMARY or SECONDARY, the
    others name the kind (PS3.3 C.7.6.1.1.2). DERIVED\PRIMARY is an ordinary processed radiograph.
    DERIVED\SECONDARY alone is not refused: lossy compression and archives write it as well.
    """
    if code_of(dataset, "QualityControlImage") == "YES":
        raise FileRejected(Reason.NOT_A_RADIOGRAPH, "the file is a quality control image")
    values = values_of(dataset, "ImageType")
    other = [value for value in values[2:] if vocabulary().image_types.look_up(value).kinds]
    if other:
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, f"the image type is {short(other[0])}, not a radiograph's"
        )
    is_capture = sop_class in _CAPTURE_CLASSES or text_of(dataset, "ConversionType") is not None
    if values[:2] == ["DERIVED", "SECONDARY"] and is_capture:
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, "the image is a secondary capture derived from others"
        )
    derived = [meaning for _, meaning in codes_of(dataset, "DerivationCodeSequence")]
    derived.append(text_of(dataset, "DerivationDescription") or "")
    if any("derivation" in vocabulary().image_types.look_up(text).kinds for text in derived):
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, "the image is derived: bones or soft tissue were taken out"
        )


def _check_intent(dataset: Dataset, sop_class: str | None) -> None:
    """Refuse raw detector values.

    An image FOR PROCESSING is input to the manufacturer's own processing, which is not stated, and
    has no VOI transformation (PS3.3 C.8.11.1.1). Readers see, and models learn from, the same
    exposure FOR PRESENTATION.
    """
    intent = code_of(dataset, "PresentationIntentType")
    if intent == "FOR PROCESSING" or (
        not intent and sop_class == DigitalXRayImageStorageForProcessing
    ):
        raise FileRejected(
            Reason.FOR_PROCESSING,
            "the file holds raw detector values (FOR PROCESSING); send the image FOR PRESENTATION",
        )


def _descriptions(dataset: Dataset) -> list[str]:
    found = []
    for part in (dataset, *items_of(dataset, _REQUEST)):
        found += [text for keyword in _DESCRIPTIONS for text in readings(part, keyword)[:1]]
        codes = [code for keyword in _DESCRIPTION_CODES for code in codes_of(part, keyword)]
        found += [meaning for _, meaning in codes]
    return found


def _describes(dataset: Dataset, kind: str) -> bool:
    views = vocabulary().views
    return any(kind in views.look_up(text).kinds for text in _descriptions(dataset))


def _description_disagrees(dataset: Dataset) -> bool:
    """Return whether a description names another part or view, an animal or a derived image.

    Descriptions are free text, often of the whole study and sometimes of an earlier one: a reason
    to flag, not to refuse.
    """
    known = vocabulary()
    for text in _descriptions(dataset):
        views = known.views.look_up(text).kinds
        # "Chest PA and lateral" describes a study of two images, of which this may be either.
        is_lateral = "not_frontal" in views and FRONTAL not in views and "decubitus" not in views
        is_elsewhere = part_of(text) not in (CHEST, PARTLY, NO_PART)
        is_animal = "animal" in known.species.look_up(text).kinds
        is_derived = "derivation" in known.image_types.look_up(text).kinds
        if is_lateral or is_elsewhere or is_animal or is_derived:
            return True
    return False
