"""Configuration keys: types, ranges, defaults, help texts and cross-field validation.

A key is declared once, in the class of its section; the file, the environment, the reference in
docs/configuration.md and the sample file derive from the declaration (`configfile`).
"""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lungwatch.daemon.intake.eligibility import IGNORED_NAMES, UNFINISHED_NAMES, NameRules
from lungwatch.errors import ConfigError
from lungwatch.models import SHIPPED_DEFAULT

if TYPE_CHECKING:
    from lungwatch.imaging.radiograph import ReadPolicy

ObserverChoice = Literal["auto", "inotify", "polling"]
GateChoice = Literal["refuse", "flag"]
SrChoice = Literal["comprehensive-3d", "comprehensive"]
DriftChoice = Literal["site", "bundle"]
LogFormat = Literal["auto", "text", "json", "journald"]
OBJECT_KINDS = ("sc", "sr")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

# TOML has lists and text where the configuration has tuples and paths.
Texts = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
FilePath = Annotated[Path, BeforeValidator(lambda v: Path(v) if isinstance(v, str) and v else v)]
Count = Annotated[int, Field(ge=0, le=36_500)]
Gigabytes = Annotated[float, Field(ge=0, le=1_000_000)]
Port = Annotated[int, Field(ge=0, le=65_535)]


class Keys(BaseSettings):
    """Keys of one section of the file.

    Attributes
    ----------
    SECTION
        Name of the TOML table; empty for the keys above the first table.
    PREFIX
        What an attribute's name has before the name of its key.
    """

    SECTION: ClassVar[str] = ""
    PREFIX: ClassVar[str] = ""
    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        defer_build=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, the first one winning; `configfile.load_config` adds its own."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings, *getattr(init_settings, "init_kwargs", {}).pop("sources", ()))


class MainKeys(Keys):
    """Home, database and model."""

    home: FilePath = Path("lungwatch-home")
    """Folder that holds `incoming/`, `done/` and the rest."""
    database_url: str = Field("", repr=False)
    """SQLAlchemy URL; empty for `lungwatch.db` in the home."""
    database_password_file: str = ""
    """File with the password that `database_url` leaves out, for example one of systemd's
    credentials; empty for none."""
    lease_s: float = Field(30.0, ge=3, le=3600)
    """Seconds without a renewal after which another daemon may take the database over, should this
    one have died where that cannot be told. It is renewed three times as often."""
    model: str = SHIPPED_DEFAULT
    """Model bundle: its name ("baseline-1.1.0") or the path of its folder."""
    trusted_keys: str = ""
    """PEM file of Ed25519 public keys, or a folder of such files (.pem, .pub). If set, only shipped
    bundles and bundles signed with one of these keys are run."""
    gate: GateChoice = "refuse"
    """What happens to an image that the model's content gate does not accept as an upright frontal
    chest X-ray: "refuse" moves it to quarantine with the reason and the score, "flag" scores it and
    adds the reason as a flag."""
    log_format: LogFormat = "auto"
    """"text", "json" (one object a line) or "journald" (fields of systemd's journal); "auto" is
    "journald" where standard error is connected to the journal, else "text"."""


class IntakeKeys(Keys):
    """Drop folder: which files are taken, and when."""

    SECTION = "intake"
    observer: ObserverChoice = "auto"
    """How changes are noticed: "inotify", "polling", or "auto" for inotify on local and polling on
    network file systems."""
    stability_s: float = Field(0.0, ge=0, le=3600)
    """Seconds without a change before a file is taken; 0 for 1 s on local and 5 s on network file
    systems, unless its writer was seen to close it or move it in. If set, a writer that closes a
    file and opens it again within this time is waited for."""
    open_timeout_s: float = Field(30.0, ge=1, le=86_400)
    """Seconds without a change after which a file that was seen being written and never closed is
    taken. Applies only where the kernel cannot tell whether it is open."""
    rescan_s: float = Field(0.5, ge=0.05, le=3600)
    """Seconds between scans of the drop folder."""
    ignored_names: Texts = IGNORED_NAMES
    """Names of files and folders that other programs leave in the drop folder. They are never
    taken, folders with all their contents; each is logged once and counted. Patterns with `*`, `?`
    and `[...]`, case-insensitive."""
    unfinished_names: Texts = UNFINISHED_NAMES
    """Names of files that another program is still writing. They are not taken until renamed, and
    logged once if unchanged for `open_timeout_s`. Patterns as in `ignored_names`; names that begin
    with a dot are always included."""
    min_free_mb: int = Field(200, ge=0, le=10_000_000)
    """Free disk space in MiB below which no file is claimed. Files wait in the drop folder until a
    tenth more than this is free."""
    max_in_flight: int = Field(16, ge=1, le=10_000)
    """Maximum of ordinary files between claim and end; bounds memory."""
    slow_in_flight: int = Field(4, ge=1, le=10_000)
    """The same of the slow lane, which large and odd files take. They are copied, unpacked and
    decoded by workers of their own, one at a time, and hold up no other file."""
    slow_from_mb: int = Field(64, ge=1, le=8192)
    """Size in MiB from which a file takes the slow lane."""
    slow_from_pixels: int = Field(32_000_000, ge=4096, le=1_000_000_000)
    """Rows times columns, as the file states them, from which a picture takes the slow lane."""


class RadiographKeys(Keys):
    """Images that are accepted as chest radiographs."""

    SECTION = "radiographs"
    modalities: Texts = ("CR", "DX", "RG")
    """Accepted values of Modality (0008,0060)."""
    body_parts: Texts = ()
    """Further values of BodyPartExamined that mean the chest, beside the known ones (docs/dicom-
    reading.md)."""
    view_positions: Texts = ()
    """Further values of ViewPosition that mean a frontal view, beside the known ones."""
    reject_lateral: bool = True
    """Reject images that are tagged as lateral views."""
    min_side_px: int = Field(64, ge=1, le=4096)
    """Minimum of rows and of columns, in pixels."""
    max_pixels: int = Field(120_000_000, ge=4096, le=1_000_000_000)
    """Maximum of rows times columns."""


class PipelineKeys(Keys):
    """Decoding, inference and overlays: threads, limits, retries."""

    SECTION = "pipeline"
    decode_workers: int = Field(2, ge=1, le=64)
    """Decoding threads, each with a process."""
    decode_timeout_s: float = Field(60.0, ge=1, le=3600)
    """Seconds to decode one file before its process is killed."""
    decode_memory_mb: int = Field(4096, ge=512, le=1_000_000)
    """Address space of one decoding process, in MiB."""
    require_sandbox: bool = False
    """Refuse to start where the kernel does not confine the decoding processes in full (seccomp,
    Landlock; docs/security.md). The systemd unit sets it."""
    inference_threads: int = Field(0, ge=0, le=256)
    """Threads of one onnxruntime call; 0 for one per processor."""
    batch_size: int = Field(8, ge=1, le=256)
    """Maximum of images in one onnxruntime call."""
    overlay_workers: int = Field(2, ge=1, le=64)
    """Overlay threads."""
    max_attempts: int = Field(3, ge=1, le=100)
    """Attempts at a file during which the process crashed."""
    retries: int = Field(4, ge=0, le=20)
    """Retries after a transient error, each after twice the previous delay."""
    stuck_s: float = Field(300.0, ge=1, le=86_400)
    """Seconds without progress, beyond a stage's own timeouts, after which it counts as stuck and
    the service manager's watchdog is no longer notified."""
    drain_s: float = Field(20.0, ge=0, le=3600)
    """Seconds that a shutdown waits for files in flight."""


class OverlayKeys(Keys):
    """Overlay images."""

    SECTION = "overlay"
    PREFIX = "overlay_"
    overlay_side_px: int = Field(1024, ge=128, le=8192)
    """Longest side of the X-ray in an overlay, in pixels; three quarters of it, at least 512, where
    it is shown twice."""
    overlay_side_by_side: bool = True
    """Show the X-ray without the map beside the one with it. A negative result has no map, and one
    X-ray either way."""


class MonitorKeys(Keys):
    """Metrics, health and drift."""

    SECTION = "monitor"
    metrics_port: Port = 0
    """Port of 127.0.0.1 that serves /metrics, /health and /ready; 0 for none."""
    metrics_textfile: str = ""
    """File that the metrics are written to, for node_exporter's textfile collector."""
    drift_reference: DriftChoice = "site"
    """What the newest results are compared with (docs/monitoring.md): "site", the first results of
    the model here, or "bundle", its training population."""
    drift_from: str = ""
    """Start of the site's reference: an ISO date or time, in the machine's zone if it has none;
    empty for the first use of the model. Change it to accept a shift."""


class RetentionKeys(Keys):
    """Retention: what `lungwatch retention run` removes, and how many backups are kept.

    Files that are still to be sent or retried, or wait for the storage commitment of what was
    sent, are never removed, nor is the newest backup; rows of the database stay.
    """

    SECTION = "retention"
    PREFIX = "retain_"
    retain_done_days: Count = 0
    """Days to keep files in `done/`; 0 for ever."""
    retain_quarantine_days: Count = 0
    """Days to keep files in `quarantine/`; 0 for ever."""
    retain_overlays_days: Count = 0
    """Days to keep files in `overlays/`; 0 for ever."""
    retain_backups_days: Count = 0
    """Days to keep files in `backups/`; 0 for ever."""
    retain_done_gb: Gigabytes = 0.0
    """Maximum size of `done/` in GiB; the oldest files go first, 0 for no limit."""
    retain_quarantine_gb: Gigabytes = 0.0
    """Maximum size of `quarantine/` in GiB."""
    retain_overlays_gb: Gigabytes = 0.0
    """Maximum size of `overlays/` in GiB."""
    retain_backups_gb: Gigabytes = 0.0
    """Maximum size of `backups/` in GiB."""
    retain_max_share: float = Field(0.25, ge=0, le=1)
    """Share of a folder's files or bytes that one run may remove unasked, beyond ten files; a
    larger removal needs `--yes`."""
    retain_max_pause_days: int = Field(7, ge=0, le=3650)
    """Days that may pass unrecorded, with the machine off, before a run needs
    `--clock-is-right`."""
    keep_backups: int = Field(14, ge=0, le=10_000)
    """Backups that `lungwatch backup create` keeps; 0 for all."""


class PacsKeys(Keys):
    """DICOM network: receiving images and sending results (extra `pacs`)."""

    SECTION = "pacs"
    PREFIX = "pacs_"
    pacs_ae_title: str = "LUNGWATCH"
    """This program's application entity title, at most 16 characters."""
    pacs_port: Port = 0
    """Port that receives images by C-STORE; 0 for none."""
    pacs_address: str = "127.0.0.1"
    """Address to listen on. "0.0.0.0" or "::" listens on every interface and requires
    `calling_addresses`."""
    pacs_calling_ae_titles: Texts = ()
    """AE titles that may send; empty for any."""
    pacs_calling_addresses: Texts = ()
    """Addresses and networks ("10.1.0.0/16") that may send; empty for this machine only."""
    pacs_max_associations: int = Field(10, ge=1, le=1000)
    """Maximum of simultaneous associations."""
    pacs_max_object_mb: int = Field(512, ge=1, le=4096)
    """Maximum size of one received object in MiB; it is written to disk while it arrives."""
    pacs_max_associations_per_address: int = Field(0, ge=0, le=1000)
    """Maximum of simultaneous associations of one address, so that one host cannot take all; 0 for
    two less than `max_associations`, at least one."""
    pacs_pdu_timeout_s: float = Field(30.0, ge=1, le=3600)
    """Seconds in which one PDU must be received or sent completely; else the connection is cut."""
    pacs_min_rate_bytes_s: int = Field(1000, ge=0, le=1_000_000_000)
    """Least rate of an unfinished message in bytes a second, measured over `pdu_timeout_s`."""
    pacs_idle_timeout_s: float = Field(60.0, ge=1, le=86_400)
    """Seconds without a message after which an association is cut."""
    pacs_tls_certificate: str = ""
    """PEM file of this side's certificate."""
    pacs_tls_key: str = ""
    """PEM file of this side's private key."""
    pacs_tls_ca: str = ""
    """PEM file that the other side's certificate is verified against; empty for the system's
    authorities."""
    pacs_destinations: Texts = ()
    """Where results are sent by C-STORE: "AETITLE@host:port", with "+tls" appended for an encrypted
    connection. Empty: nothing is sent."""
    pacs_send: Texts = OBJECT_KINDS
    """Objects sent for each result: "sc" (the overlay as a Secondary Capture), "sr" (a Structured
    Report)."""
    pacs_sr: SrChoice = "comprehensive-3d"
    """SOP class of the report: "comprehensive-3d" or "comprehensive"."""
    pacs_deidentify: bool = False
    """Send objects without what identifies the patient."""
    pacs_deidentify_key: str = ""
    """File with the secret that pseudonyms are derived from."""
    pacs_retry_s: float = Field(5.0, ge=0.1, le=3600)
    """Seconds before a destination that was not reached is tried again, doubled each time up to
    `retry_max_s`."""
    pacs_retry_max_s: float = Field(900.0, ge=0.1, le=86_400)
    """Maximum of seconds between attempts."""
    pacs_storage_commitment: Texts = ()
    """Those of `destinations` that are asked for storage commitment (N-ACTION) of what they were
    sent. Objects are kept in `outbox/` until they are committed."""
    pacs_commitment_wait_s: float = Field(600.0, ge=1, le=86_400)
    """Seconds that a destination has to report on such a request before it is asked again."""
    pacs_commitment_deadline_s: float = Field(86_400.0, ge=1, le=31_536_000)
    """Seconds after which a commitment that was not reported has failed; also how long this side
    tries to report to others."""
    pacs_commitment_requesters: Texts = ()
    """Where the reports on other systems' requests for storage commitment go: "AETITLE@host:port",
    as in `destinations`, which are included. A requester that is not listed is answered over the
    association of its request."""


SECTIONS: tuple[type[Keys], ...] = (
    MainKeys,
    IntakeKeys,
    RadiographKeys,
    PipelineKeys,
    OverlayKeys,
    MonitorKeys,
    RetentionKeys,
    PacsKeys,
)


class Config(
    PacsKeys,
    RetentionKeys,
    MonitorKeys,
    OverlayKeys,
    PipelineKeys,
    RadiographKeys,
    IntakeKeys,
    MainKeys,
):
    """The whole configuration, immutable. Constructed in code it reads no file and no variable."""

    @property
    def name_rules(self) -> NameRules:
        """Names in the drop folder that are not taken."""
        return NameRules(self.ignored_names, self.unfinished_names)

    @property
    def drift_since(self) -> datetime | None:
        """Start of the site's reference for drift; None for the model's first use."""
        return datetime.fromisoformat(self.drift_from).astimezone() if self.drift_from else None

    @property
    def read_policy(self) -> "ReadPolicy":
        """Images that the reader accepts."""
        from lungwatch.imaging.radiograph import ReadPolicy  # noqa: PLC0415 - loads the imaging libraries

        return ReadPolicy(
            modalities=frozenset(value.upper() for value in self.modalities),
            body_parts=frozenset(value.strip().upper() for value in self.body_parts),
            view_positions=frozenset(value.strip().upper() for value in self.view_positions),
            reject_lateral=self.reject_lateral,
            min_side_px=self.min_side_px,
            max_pixels=self.max_pixels,
        )

    def replace(self, **changes: object) -> Self:
        """Return a copy with other values, which are not validated."""
        return self.model_copy(update=changes)

    def validate_together(self) -> None:
        """Validate what the keys must satisfy together.

        Raises
        ------
        ConfigError
            Naming the key.
        """
        for name in ("ignored_names", "unfinished_names"):
            for pattern in getattr(self, name):
                if not pattern.strip("*"):
                    raise ConfigError(
                        f"bad value for 'intake.{name}': {pattern!r} matches every name, or none"
                    )
        try:
            _ = self.drift_since
        except (ValueError, OverflowError) as error:
            raise ConfigError(
                f"bad value for 'monitor.drift_from': {self.drift_from!r} is not a date or time: "
                "write 2026-01-31 or 2026-01-31T08:00"
            ) from error
        self._validate_sending()
        self.validate_receiving()

    def validate_receiving(self) -> None:
        """Refuse a port that is open to the network and to every sender.

        Raises
        ------
        ConfigError
            Naming the key.
        """
        is_open = self.pacs_port and not self.pacs_calling_addresses
        if is_open and self.pacs_address not in _LOOPBACK:
            raise ConfigError(
                f"'pacs.address' {self.pacs_address} is open to the network: list the permitted "
                "senders in 'pacs.calling_addresses'"
            )

    def _validate_sending(self) -> None:
        if not is_ae_title(self.pacs_ae_title):
            raise ConfigError(
                f"bad value for 'pacs.ae_title': {self.pacs_ae_title!r} is not of 1 to 16 "
                "characters"
            )
        for key in ("destinations", "commitment_requesters"):
            for text in getattr(self, f"pacs_{key}"):
                try:
                    parse_destination(text)
                except ConfigError as error:
                    raise ConfigError(f"bad value for 'pacs.{key}': {error}") from error
        for text in self.pacs_storage_commitment:
            if text not in self.pacs_destinations:
                raise ConfigError(
                    f"bad value for 'pacs.storage_commitment': {text!r} is not one of "
                    "'pacs.destinations'"
                )
        if len(set(self.pacs_destinations)) < len(self.pacs_destinations):
            raise ConfigError("bad value for 'pacs.destinations': one is listed twice")
        kinds = self.pacs_send
        if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(OBJECT_KINDS):
            raise ConfigError(
                f"bad value for 'pacs.send': {list(kinds)!r} is not a list of sc and sr, each once"
            )
        if self.pacs_deidentify and not self.pacs_deidentify_key:
            raise ConfigError(
                "'pacs.deidentify' needs 'pacs.deidentify_key', the path of a file with a secret: "
                "make one with `head -c 32 /dev/urandom > FILE; chmod 600 FILE`"
            )
        if self.pacs_retry_max_s < self.pacs_retry_s:
            raise ConfigError("'pacs.retry_max_s' is less than 'pacs.retry_s'")


_TLS = "+tls"
# An AE title: up to 16 of the default repertoire but backslash and controls (PS3.5, 6.2).
_AE_TITLE = re.compile(r"[\x20-\x5b\x5d-\x7e]{1,16}")
_ADDRESS = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:@\[\]]+)):(?P<port>[0-9]{1,5})"
)
_MAX_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class Destination:
    """An application entity that takes objects by C-STORE.

    Attributes
    ----------
    name
        As configured; names the destination in the database.
    ae_title
        Of the called application entity, without padding.
    tls
        Whether the connection is encrypted.
    """

    name: str
    ae_title: str
    host: str
    port: int
    tls: bool


def is_ae_title(text: str) -> bool:
    """Return whether a text can be the title of an application entity."""
    return _AE_TITLE.fullmatch(text) is not None and not text.isspace()


def parse_destination(text: str) -> Destination:
    """Parse ``AETITLE@host:port`` or ``AETITLE@host:port+tls``.

    Raises
    ------
    ConfigError
        If the text has another form.
    """
    tls = text.endswith(_TLS)
    ae_title, _, address = text.removesuffix(_TLS).rpartition("@")
    found = _ADDRESS.fullmatch(address)
    if not is_ae_title(ae_title) or found is None:
        raise ConfigError(
            f"{text!r} is no destination: write AETITLE@host:port, or AETITLE@host:port{_TLS}, "
            "the title of at most 16 characters"
        )
    port = int(found["port"])
    if not 1 <= port <= _MAX_PORT:
        raise ConfigError(f"{text!r} is no destination: a port is within 1..{_MAX_PORT}")
    return Destination(
        name=text, ae_title=ae_title.strip(), host=found["six"] or found["host"], port=port, tls=tls
    )
