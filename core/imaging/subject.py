"""What a DICOM file says it shows: a human chest, from the front, made to be looked at."""

from pydicom.dataset import Dataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    MediaStorageDirectoryStorage,
)

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.attributes import code_of, short, text_of

_RADIOGRAPH_CLASSES = {
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
}
# Left and right laterals and the obliques: PS3.3 C.8.11.5.1.1 (CR) and DX View Position.
_NOT_FRONTAL = {"LL", "RL", "LLD", "RLD", "LLO", "RLO", "LATERAL", "LAT"}


def check_subject(
    dataset: Dataset,
    *,
    modalities: frozenset[str],
    body_parts: frozenset[str],
    reject_lateral: bool,
) -> None:
    """Refuse a file whose attributes say that it is no frontal chest radiograph.

    Parameters
    ----------
    modalities, body_parts, reject_lateral
        As in `lungwatch.imaging.ReadPolicy`.

    Raises
    ------
    FileRejected
        With the first of these that applies: a media directory, another modality, another
        species, another body part, a lateral view, raw detector values.
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
    species = code_of(dataset, "PatientSpeciesDescription") or "HUMAN"
    if "HUMAN" not in species and "SAPIENS" not in species:
        raise FileRejected(Reason.NOT_HUMAN, "the file names a species other than human")
    body_part = code_of(dataset, "BodyPartExamined")
    if body_part and body_part not in body_parts:
        raise FileRejected(Reason.WRONG_BODY_PART, f"body part {short(body_part)} is not the chest")
    view = code_of(dataset, "ViewPosition")
    if reject_lateral and view in _NOT_FRONTAL:
        raise FileRejected(Reason.NOT_FRONTAL, f"view position {short(view)} is not frontal")
    _check_intent(dataset, sop_class)


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
