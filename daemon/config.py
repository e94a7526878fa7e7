"""Configuration keys: types, ranges, defaults, help texts and cross-field validation."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from lungwatch.daemon.intake.eligibility import IGNORED_NAMES, UNFINISHED_NAMES, NameRules
from lungwatch.errors import ConfigError
from lungwatch.imaging.reader import ReadPolicy
from lungwatch.models import SHIPPED_DEFAULT

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
    """Whether a text can be the title of an application entity."""
    return _AE_TITLE.fullmatch(text) is not None and not text.isspace()


def parse_destination(text: str) -> Destination:
    """Return the destination that ``AETITLE@host:port`` or ``AETITLE@host:port+tls`` names.

    Raises
    ------
    ConfigError
        If the text is no such thing.
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


_PARSERS: dict[Any, Callable[[str], object]] = {
    int: int,
    float: float,
    tuple: lambda text: [part.strip() for part in text.split(",") if part.strip()],
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is allowed for one key.

    Attributes
    ----------
    name
        As in the TOML file.
    kind
        Type of its value: str, int, float, bool, `Path`, or tuple for a list of strings.
    choices
        The values that a str may have; any if empty.
    limits
        Least and greatest value of a number; None for any.
    """

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None

    @classmethod
    def of(cls, name: str, annotation: object, limits: tuple[float, float] | None) -> "Key":
        """Return the key of a field with this annotation."""
        if get_origin(annotation) is Literal:
            return cls(name=name, kind=str, choices=get_args(annotation))
        kind = get_origin(annotation) or annotation
        return cls(name=name, kind=cast(type, kind), limits=limits)

    def parse(self, text: str, variable: str) -> object:
        """Turn an environment variable's text into what the TOML file would hold.

        Raises
        ------
        ConfigError
            If the text is none; it names the variable.
        """
        try:
            return _PARSERS[self.kind](text) if self.kind in _PARSERS else text
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{variable}: {text!r} is not a value for '{self.name}'") from error

    def check(self, value: object, where: str) -> object:
        """Return the value as the configuration holds it.

        Raises
        ------
        ConfigError
            If its type, or it, is not allowed; it says where it was found.
        """
        problem = f"bad value for '{self.name}' {where}: "
        typed = self._typed(value)
        if typed is None:
            raise ConfigError(f"{problem}{value!r}")
        if self.choices and typed not in self.choices:
            *others, last = self.choices
            raise ConfigError(f"{problem}{value!r} is not {', '.join(others)} or {last}")
        if self.limits and isinstance(typed, int | float):
            low, high = self.limits
            if not low <= typed <= high:
                raise ConfigError(f"{problem}{typed} is not within {low}..{high}")
        return typed

    def _typed(self, value: object) -> object | None:
        if self.kind is tuple:
            is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
            return tuple(cast(list[str], value)) if is_list else None
        if self.kind is Path:
            return Path(value) if isinstance(value, str) and value else None
        if self.kind is float and type(value) is int:
            return float(value)
        return value if type(value) is self.kind else None


OBJECT_KINDS = ("sc", "sr")


def check_names(config: "Config") -> None:
    """Refuse a pattern with which nothing would ever be taken.

    Raises
    ------
    ConfigError
        If there is one.
    """
    for key in ("ignored_names", "unfinished_names"):
        for pattern in getattr(config, key):
            if not pattern.strip("*"):
                raise ConfigError(f"bad value for '{key}': {pattern!r} matches every name, or none")


def check_drift(config: "Config") -> None:
    """Refuse a beginning that is no time.

    Raises
    ------
    ConfigError
        If it is none.
    """
    try:
        _ = config.drift_since
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"bad value for 'drift_from': {config.drift_from!r} is no date or time: write "
            "2026-01-31 or 2026-01-31T08:00"
        ) from error


def check_receiving(config: "Config") -> None:
    """Refuse a port that is open to a network from which nobody may send.

    Raises
    ------
    ConfigError
        If it is.
    """
    if not config.pacs_port or config.pacs_calling_addresses:
        return
    if config.pacs_address not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"'pacs_address' {config.pacs_address} is open to the network: name who may send in "
            "'pacs_calling_addresses'"
        )


def check_sending(config: "Config") -> None:
    """Refuse what can be told of the destinations before one of them is asked.

    Raises
    ------
    ConfigError
        For a bad title, destination or kind of object, or a pseudonym without its key.
    """
    if not is_ae_title(config.pacs_ae_title):
        raise ConfigError(
            f"bad value for 'pacs_ae_title': {config.pacs_ae_title!r} is not of 1 to 16 characters"
        )
    for text in config.pacs_destinations:
        try:
            parse_destination(text)
        except ConfigError as error:
            raise ConfigError(f"bad value for 'pacs_destinations': {error}") from error
    if len(set(config.pacs_destinations)) < len(config.pacs_destinations):
        raise ConfigError("bad value for 'pacs_destinations': one is named twice")
    kinds = config.pacs_send
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(OBJECT_KINDS):
        raise ConfigError(
            f"bad value for 'pacs_send': {list(kinds)!r} is not of sc and sr, each once"
        )
    if config.pacs_deidentify and not config.pacs_deidentify_key:
        raise ConfigError(
            "'pacs_deidentify' needs 'pacs_deidentify_key', the path of a file with a secret: "
            "make one with `head -c 32 /dev/urandom > FILE; chmod 600 FILE`"
        )
    if config.pacs_retry_max_s < config.pacs_retry_s:
        raise ConfigError("'pacs_retry_max_s' is less than 'pacs_retry_s'")


ObserverChoice = Literal["auto", "inotify", "polling"]

GateChoice = Literal["refuse", "flag"]

SrChoice = Literal["comprehensive-3d", "comprehensive"]

DriftChoice = Literal["site", "bundle"]

LogFormat = Literal["auto", "text", "json", "journald"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set.

    Attributes
    ----------
    home
        Folder that holds `incoming/`, `done/` and the rest.
    database_url
        SQLAlchemy URL; empty for `lungwatch.db` in the home.
    database_password_file
        Path of a file with the password that the URL leaves out, such as one of systemd's
        credentials; empty for none.
    model
        Name of a bundle ("baseline-1.1.0") or path of a bundle's folder.
    trusted_keys
        Path of a PEM file of Ed25519 public keys, or of a folder of such files (.pem, .pub). If
        set, only bundles that one of these keys signed are run, and the shipped ones.
    gate
        What becomes of a picture that the model's content gate does not accept as an upright
        frontal chest X-ray: "refuse" (to quarantine, with the reason and the score), or "flag"
        (scored, with that reason as a flag).
    observer
        "auto" takes inotify on local file systems and polling on network ones.
    stability_s
        Seconds that a file must be unchanged before it is taken, unless its writer was seen
        to close it or move it in; 0 picks 1 s on local and 5 s on network file systems.
    open_timeout_s
        Seconds without a change after which a file that was seen being written, and never
        closed, is taken all the same. Only where the kernel can't tell whether it is open.
    rescan_s
        Seconds between two looks at the whole drop folder.
    ignored_names
        Names of files and folders in the drop folder that other programs put there for themselves:
        never taken, folders with all that is in them, each logged once and counted. Patterns with
        `*`, `?` and `[...]`, without regard to case.
    unfinished_names
        Names under which other programs build a file up: not taken until it is renamed, and logged
        once if it lies unchanged for `open_timeout_s`. Patterns as in `ignored_names`; names that
        begin with a dot are always among them.
    decode_workers, overlay_workers
        Threads of the two stages that can run beside each other.
    decode_timeout_s
        Seconds that decoding one file may take before its process is killed.
    decode_memory_mb
        Address space that one decoding process may take, in MiB.
    inference_threads
        Threads of one onnxruntime call; 0 for one per processor.
    batch_size
        Most images in one onnxruntime call.
    max_in_flight
        Most files between claim and end; bounds the memory.
    max_attempts
        Tries at a file that the process did not survive.
    retries
        Tries again after a passing trouble, each after twice the time of the one before.
    stuck_s
        Seconds without progress, beyond its own timeouts, after which a stage counts as stuck
        and the service manager's watchdog is no longer fed.
    min_free_mb
        Free space below which no file is claimed, in MiB. Files wait in the drop folder then,
        until a tenth more than this is free.
    drain_s
        Seconds that a stop waits for what is in flight.
    overlay_side_px
        Longest side of the X-ray in an overlay; three quarters of it, but at least 512, where it
        is shown twice.
    overlay_side_by_side
        Show the untouched X-ray beside the one under the map. A negative answer has no map, and
        one X-ray, either way.
    modalities, reject_lateral, min_side_px, max_pixels
        What counts as a chest radiograph; see `lungwatch.imaging.ReadPolicy`.
    body_parts, view_positions
        Values of BodyPartExamined and ViewPosition that are taken for the chest and for a frontal
        view beside those that are known (docs/dicom-reading.md).
    log_format
        "text", "json" (an object a line) or "journald" (fields of systemd's journal); "auto" is
        "journald" where standard error leads to the journal, else "text".
    metrics_port
        Port of this machine (127.0.0.1) that serves /metrics, /health and /ready; 0: none.
    metrics_textfile
        Path of a file that the metrics are written to, for node_exporter's textfile collector.
    drift_reference
        What the newest results are compared with (docs/monitoring.md): "site", the first results
        of the model here, or "bundle", the population that it was trained on.
    drift_from
        Where the site's reference begins: an ISO date or time, in the machine's zone if it has
        none; empty for the first use of the model. Set it anew to accept a change.
    retain_done_days, retain_quarantine_days, retain_overlays_days, retain_backups_days
        Days after its end that `lungwatch retention run` leaves a file of this folder; 0: for
        ever. What is still to be sent or tried again is never removed, nor is the newest backup;
        the row stays. The outbox keeps what is still to be sent, and nothing else.
    retain_done_gb, retain_quarantine_gb, retain_overlays_gb, retain_backups_gb
        GiB that this folder may hold, what has to stay counted in; the oldest files go first. 0:
        no limit.
    keep_backups
        Backups of the database that `lungwatch backup create` keeps; 0: all.
    pacs_ae_title
        This program's own application entity title, at most 16 characters.
    pacs_port, pacs_address
        Where images are received by C-STORE; port 0: nowhere. "0.0.0.0" or "::" listens on
        every interface, and needs `pacs_calling_addresses`.
    pacs_calling_ae_titles, pacs_calling_addresses
        Who may send: AE titles (all if empty), and addresses or networks such as "10.1.0.0/16"
        (this machine alone if empty).
    pacs_max_associations, pacs_max_object_mb
        Most associations at once; most MiB of one object, held in memory while it comes.
    pacs_tls_certificate, pacs_tls_key, pacs_tls_ca
        Paths of PEM files: this side's certificate and key, and what the other side's
        certificate is checked against (the system's authorities if empty).
    pacs_destinations
        Where results are sent by C-STORE: "AETITLE@host:port", with "+tls" at the end where
        the connection is to be encrypted. None: nothing is sent.
    pacs_send
        What is sent of each result: "sc" (the overlay as a Secondary Capture), "sr" (a
        Structured Report).
    pacs_sr
        The SOP class of the report: "comprehensive-3d" or "comprehensive".
    pacs_deidentify, pacs_deidentify_key
        Send without what identifies the patient; the key is the path of a file that holds the
        secret from which pseudonyms are made.
    pacs_retry_s, pacs_retry_max_s
        Seconds before a destination that was not reached is tried again, doubled each time up
        to the most.
    """

    home: Path = Path("lungwatch-home")
    database_url: str = field(default="", repr=False)
    database_password_file: str = ""
    model: str = SHIPPED_DEFAULT
    trusted_keys: str = ""
    gate: GateChoice = "refuse"
    observer: ObserverChoice = "auto"
    stability_s: float = 0.0
    open_timeout_s: float = 30.0
    rescan_s: float = 0.5
    ignored_names: tuple[str, ...] = IGNORED_NAMES
    unfinished_names: tuple[str, ...] = UNFINISHED_NAMES
    decode_workers: int = 2
    overlay_workers: int = 2
    decode_timeout_s: float = 60.0
    decode_memory_mb: int = 4096
    inference_threads: int = 0
    batch_size: int = 8
    max_in_flight: int = 16
    max_attempts: int = 3
    retries: int = 4
    stuck_s: float = 300.0
    min_free_mb: int = 200
    drain_s: float = 20.0
    overlay_side_px: int = 1024
    overlay_side_by_side: bool = True
    modalities: tuple[str, ...] = tuple(sorted(ReadPolicy().modalities))
    body_parts: tuple[str, ...] = ()
    view_positions: tuple[str, ...] = ()
    reject_lateral: bool = True
    min_side_px: int = 64
    max_pixels: int = 120_000_000
    log_format: LogFormat = "auto"
    metrics_port: int = 0
    metrics_textfile: str = ""
    drift_reference: DriftChoice = "site"
    drift_from: str = ""
    retain_done_days: int = 0
    retain_quarantine_days: int = 0
    retain_overlays_days: int = 0
    retain_backups_days: int = 0
    retain_done_gb: float = 0.0
    retain_quarantine_gb: float = 0.0
    retain_overlays_gb: float = 0.0
    retain_backups_gb: float = 0.0
    keep_backups: int = 14
    pacs_ae_title: str = "LUNGWATCH"
    pacs_port: int = 0
    pacs_address: str = "127.0.0.1"
    pacs_calling_ae_titles: tuple[str, ...] = ()
    pacs_calling_addresses: tuple[str, ...] = ()
    pacs_max_associations: int = 10
    pacs_max_object_mb: int = 512
    pacs_tls_certificate: str = ""
    pacs_tls_key: str = ""
    pacs_tls_ca: str = ""
    pacs_destinations: tuple[str, ...] = ()
    pacs_send: tuple[str, ...] = OBJECT_KINDS
    pacs_sr: SrChoice = "comprehensive-3d"
    pacs_deidentify: bool = False
    pacs_deidentify_key: str = ""
    pacs_retry_s: float = 5.0
    pacs_retry_max_s: float = 900.0

    @property
    def name_rules(self) -> NameRules:
        """Which names in the drop folder are not taken."""
        return NameRules(self.ignored_names, self.unfinished_names)

    @property
    def drift_since(self) -> datetime | None:
        """When the site's reference for drift begins; None for the model's first use."""
        return datetime.fromisoformat(self.drift_from).astimezone() if self.drift_from else None

    @property
    def read_policy(self) -> ReadPolicy:
        """What the reader accepts."""
        return ReadPolicy(
            modalities=frozenset(value.upper() for value in self.modalities),
            body_parts=frozenset(value.strip().upper() for value in self.body_parts),
            view_positions=frozenset(value.strip().upper() for value in self.view_positions),
            reject_lateral=self.reject_lateral,
            min_side_px=self.min_side_px,
            max_pixels=self.max_pixels,
        )


_RANGES: dict[str, tuple[float, float]] = {
    "stability_s": (0, 3600),
    "open_timeout_s": (1, 86_400),
    "rescan_s": (0.05, 3600),
    "decode_workers": (1, 64),
    "overlay_workers": (1, 64),
    "decode_timeout_s": (1, 3600),
    "decode_memory_mb": (512, 1_000_000),
    "inference_threads": (0, 256),
    "batch_size": (1, 256),
    "max_in_flight": (1, 10_000),
    "max_attempts": (1, 100),
    "retries": (0, 20),
    "stuck_s": (1, 86_400),
    "min_free_mb": (0, 10_000_000),
    "drain_s": (0, 3600),
    "overlay_side_px": (128, 8192),
    "min_side_px": (1, 4096),
    "max_pixels": (4096, 1_000_000_000),
    "metrics_port": (0, 65_535),
    "retain_done_days": (0, 36_500),
    "retain_quarantine_days": (0, 36_500),
    "retain_overlays_days": (0, 36_500),
    "retain_backups_days": (0, 36_500),
    "retain_done_gb": (0, 1_000_000),
    "retain_quarantine_gb": (0, 1_000_000),
    "retain_overlays_gb": (0, 1_000_000),
    "retain_backups_gb": (0, 1_000_000),
    "keep_backups": (0, 10_000),
    "pacs_port": (0, 65_535),
    "pacs_max_associations": (1, 1000),
    "pacs_max_object_mb": (1, 4096),
    "pacs_retry_s": (0.1, 3600),
    "pacs_retry_max_s": (0.1, 86_400),
}
