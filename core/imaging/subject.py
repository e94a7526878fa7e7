"""Subject: what a DICOM file says it shows, which must be a human chest made to be looked at."""

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

from lungwatch.errors import FileRejected, Reason
from lungwatch.flags import Flag
from lungwatch.imaging.attributes import code_of, codes_of, items_of, short, text_of, values_of
from lungwatch.imaging.bodypart import CHEST, PARTLY, UNKNOWN, check_body_part, part_of
from lungwatch.imaging.view import FRONTAL, check_view, view_of
from lungwatch.imaging.vocabulary import readings, says_nothing, vocabulary

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
# Of every UID that DICOM itself has given out (PS3.5 9.1).
_STANDARD_ROOT = "1.2.840.10008."
_PROJECTION_MODALITIES = {"CR", "DX", "RG"}
# Said of animals alone: PS3.3 C.7.1.1 makes these conditional on the patient being one.
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
# What was ordered is said in the request as well (PS3.3 10.6).
_REQUEST = "RequestAttributesSequence"


def check_subject(
    dataset: Dataset,
    *,
    modalities: Collection[str],
    body_parts: Collection[str],
    view_positions: Collection[str],
    reject_lateral: bool,
) -> tuple[Flag, ...]:
    """Refuse a file whose attributes say that it is no frontal chest radiograph.

    Parameters
    ----------
    modalities, body_parts, view_positions, reject_lateral
        As in `lungwatch.imaging.ReadPolicy`.

    Returns
    -------
    tuple of Flag
        What the file leaves open, and where its descriptions disagree with the rest.

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
    if modality and modality not in modalities:
        wanted = ", ".join(sorted(modalities))
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, f"modality {short(modality)} is not a radiograph ({wanted})"
        )
    _check_species(dataset)
    if not modality or modality in _PROJECTION_MODALITIES:
        _check_class(dataset, modality, sop_class)
        _check_image_type(dataset, sop_class)
    flags = (
        *check_body_part(dataset, body_parts),
        *check_view(dataset, view_positions, refuse=reject_lateral),
    )
    _check_intent(dataset, sop_class)
    if Flag.DECUBITUS not in flags and _describes(dataset, "decubitus"):
        flags = (*flags, Flag.DECUBITUS)
    return (*flags, Flag.DESCRIPTION_DISAGREES) if _description_disagrees(dataset) else flags


def check_not_directory(dataset: Dataset) -> None:
    """Refuse the index of a CD or folder (DICOMDIR): its files are read one by one.

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
    """Refuse animals.

    Patient Species Description is only there where the Code Sequence is not (PS3.3 C.7.1.1), and
    breed, owner, castration and quadruped directions are only there of animals.
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
    """Refuse images whose class is not that of a radiograph, whatever modality they name.

    A Secondary Capture may be a digitised film, or an exported radiograph that has kept what it
    shows and from where; what a workstation captures from its screen names neither. Private
    classes and files without one pass.
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
        # DX images are of the DX classes (PS3.3 A.26); only their modality would be copied.
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
    """Refuse what was made of images: results, localizers, energy subtraction, quality control.

    Image Type (0008,0008): value 1 is ORIGINAL or DERIVED, value 2 PRIMARY or SECONDARY, the
    others say what kind it is (PS3.3 C.7.6.1.1.2). DERIVED and PRIMARY make an ordinary processed
    radiograph. DERIVED and SECONDARY alone are not refused, since lossy compression and archives
    write them as well.
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

    PS3.3 C.8.11.1.1: an image FOR PROCESSING is input to the manufacturer's own processing,
    which is not stated, and has no VOI transformation; the same exposure FOR PRESENTATION is
    what readers, and the images that models learn from, show.
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
    """Whether a description names another part, another view, an animal or a derived image.

    Descriptions are free text, often of the whole study and sometimes of the last one: a hint to
    look, and no reason to refuse.
    """
    known = vocabulary()
    for text in _descriptions(dataset):
        views = known.views.look_up(text).kinds
        # "Chest PA and lateral" describes a study of two images, of which this may be either.
        is_lateral = "not_frontal" in views and FRONTAL not in views and "decubitus" not in views
        is_elsewhere = part_of(text) not in (CHEST, PARTLY, UNKNOWN)
        is_animal = "animal" in known.species.look_up(text).kinds
        is_derived = "derivation" in known.image_types.look_up(text).kinds
        if is_lateral or is_elsewhere or is_animal or is_derived:
            return True
    return False
