"""Row types that the queries return."""

from dataclasses import dataclass
from datetime import datetime

from lungwatch.db.delivery_states import DeliveryState
from lungwatch.db.states import State


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """What became of one image with one model.

    Attributes
    ----------
    id
        Number of the result.
    sha256, source_name
        The content, and the name it first came under.
    status
        ``done``, ``rejected``, ``failed``, or the state on the way there.
    reason, message
        Why it was rejected or failed: a stable code and a line for people.
    label
        ``COVID``, ``NEGATIVE`` or ``UNCERTAIN``.
    probability, threshold
        Calibrated, 0..1.
    uncertain_from, uncertain_to
        Probabilities within [from, to) are ``UNCERTAIN``; equal where the model never abstains.
    calibration
        The site calibration whose probability, threshold and band these are; None: the bundle's.
    flags
        Codes of what is remarkable about the case (`lungwatch.flags`).
    gate_score, lung_area, lung_share
        Of the content gate, 0..1 (`lungwatch.plausibility.Plausibility`); None without one.
    model, model_version
        Who scored it.
    overlay, file
        Paths relative to the home.
    patient_id, study_uid, series_uid, sop_uid, accession
        As the file says.
    received_at, finished_at
        UTC.
    duration_ms
        From the claim to the result.
    attempts
        Runs started since the last drop or retry.
    arrivals
        How many times the content was dropped for this result.
    delivery
        State of what is sent to a PACS: ``failed`` or ``invalid`` if one is, else ``queued``
        or ``sending`` if one is, else ``sent``; None where nothing is sent.
    """

    id: int
    sha256: str
    source_name: str
    status: State
    reason: str | None
    label: str | None
    probability: float | None
    threshold: float | None
    uncertain_from: float | None
    uncertain_to: float | None
    calibration: str | None
    flags: tuple[str, ...]
    gate_score: float | None
    lung_area: float | None
    lung_share: float | None
    model: str
    model_version: str
    overlay: str | None
    patient_id: str | None
    study_uid: str | None
    series_uid: str | None
    sop_uid: str | None
    accession: str | None
    received_at: datetime
    finished_at: datetime | None
    duration_ms: int | None
    message: str | None
    attempts: int
    file: str | None
    arrivals: int
    delivery: DeliveryState | None


@dataclass(frozen=True, kw_only=True)
class ResultDetail(ResultRow):
    """A result whole, with what the file says about the image.

    The fields after `claimed_at` are those of `lungwatch.imaging.RadiographMeta`, and then:

    Attributes
    ----------
    file_removed_at, overlay_removed_at
        When retention removed them; None for what is there, or gone otherwise.
    """

    logit: float | None
    model_sha256: str
    size_bytes: int
    claimed_at: datetime | None
    format: str | None
    rows: int | None
    columns: int | None
    bits_stored: int | None
    photometric: str | None
    transfer_syntax: str | None
    sop_class: str | None
    modality: str | None
    body_part: str | None
    view_position: str | None
    study_date: str | None
    series_date: str | None
    acquisition_date: str | None
    manufacturer: str | None
    manufacturer_model: str | None
    station: str | None
    institution: str | None
    file_removed_at: datetime | None
    overlay_removed_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class TrackedFile:
    """A result as the folders see it.

    Attributes
    ----------
    path, overlay
        Relative to the home; None where there is no file.
    received_at
        UTC; decides the folder in ``done``.
    removed_at
        When retention removed the file, should `path` be None for that.
    """

    result_id: int
    image_id: int
    model_id: int
    sha256: str
    state: State
    reason: str | None
    path: str | None
    received_at: datetime
    overlay: str | None
    source_name: str
    removed_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class ResultFilter:
    """Which results are meant; a field that is None leaves all.

    Attributes
    ----------
    since, until
        ``since <= received_at < until``, with a zone.
    made_since
        ``made_since <= finished_at``; the results then come in the order of that time.
    min_score, max_score
        ``min_score <= probability <= max_score``; results without one never match.
    flag
        One that the result carries.
    patient, accession, study
        Whole values of patient ID, accession number and study UID.
    model
        A name ("baseline") or a name and version ("baseline-1.1.0").
    limit
        At most so many, the newest.
    """

    since: datetime | None = None
    until: datetime | None = None
    made_since: datetime | None = None
    label: str | None = None
    status: str | None = None
    flag: str | None = None
    min_score: float | None = None
    max_score: float | None = None
    patient: str | None = None
    accession: str | None = None
    study: str | None = None
    model: str | None = None
    limit: int | None = None
