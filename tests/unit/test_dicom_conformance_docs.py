"""The conformance statement names what is in the code."""

import inspect
import re
from pathlib import Path

import pytest
from pydicom.datadict import keyword_dict
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    SecondaryCaptureImageStorage,
)

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.configfile import KEYS
from lungwatch.daemon.pacs import objects, report
from lungwatch.daemon.pacs.report import MANDATORY_ITEMS
from lungwatch.daemon.pacs.source import conclusion

TEXT = (Path(__file__).parents[2] / "docs/dicom-conformance.md").read_text(encoding="utf-8")


def test_every_configuration_key_named_exists_and_every_key_of_the_network_is_named():
    keys = {key.dotted for key in KEYS.values()}
    named = set(re.findall(r"`((?:pacs|intake)\.[a-z_]+|database_url)`", TEXT))
    assert named <= keys
    assert {key for key in keys if key.startswith("pacs.")} <= named


def test_the_sop_classes_sent_are_those_validated():
    sent = {SecondaryCaptureImageStorage, ComprehensiveSRStorage, Comprehensive3DSRStorage}
    assert set.union(*objects._CLASSES.values()) == sent
    for uid in sent:
        assert f"| {uid} | yes | yes |" in TEXT


def test_every_code_of_the_report_is_named():
    for code, _ in MANDATORY_ITEMS:
        assert code in TEXT, code
    own = (
        *(report.COVID_19, report.CHEST_X_RAY, report.PATTERN, report.DECISION),
        *(report.TRUST_FLAG, report.GATE_SCORE, report.LUNG_AREA, report.LUNG_SHARE),
        *(report.OPACITY_FOUND, report.finding_probability("opacity")),
    )
    for code in (*own, *report.PRESENCE.values(), *report.SCORES.values()):
        assert f"{code.value} {code.scheme_designator}" in TEXT, code
    for label, presence in report.PRESENCE.items():
        found = report.COVID_19.meaning if label == "COVID" else "none"
        row = f"| {label} | {found} | {presence.meaning} | {conclusion(label)} |"
        assert row in TEXT
    opaque = conclusion("NEGATIVE", ("other_opacity",))
    assert f"| NEGATIVE with `other_opacity` | opacity | Absent | {opaque} |" in TEXT


def test_series_numbers_and_the_research_text_are_those_of_the_code():
    assert f"{objects.SERIES_NUMBER} (Secondary Capture)" in TEXT
    assert f"{report.SERIES_NUMBER} (report)" in TEXT
    assert RESEARCH_USE_ONLY in TEXT


def test_every_attribute_that_deidentification_touches_is_named():
    section = TEXT.partition("### 5.4")[2].partition("\n## ")[0]
    for keyword in (*objects._EMPTIED, *objects._REMOVED):
        assert keyword in section, keyword
    assert f"{objects.DUMMY_DATE:%Y-%m-%d}" in section
    assert f"{objects._ID_DIGITS} hexadecimal digits" in section


def test_every_attribute_named_is_in_the_dictionary():
    section = TEXT.partition("## 5")[2].partition("\n## 6")[0]
    words = set(re.findall(r"\b(?:[A-Z][a-z]+){2,}\b|\b[A-Z][A-Za-z]+(?:UID|ID)\b", section))
    words -= {"COVID"}
    assert len(words) > 20
    assert words <= set(keyword_dict)


def test_the_listeners_answers_and_limits_are_those_of_the_code():
    pytest.importorskip("pynetdicom", reason="needs the extra 'pacs'")
    from lungwatch.daemon.config import Config
    from lungwatch.daemon.pacs import connections, listener, reception

    for status in (
        reception.SUCCESS,
        reception.OUT_OF_RESOURCES,
        reception.DOES_NOT_MATCH,
        reception.CANNOT_UNDERSTAND,
        reception.PROCESSING_FAILURE,
    ):
        assert f"| 0x{status:04X} |" in TEXT
    assert f"{listener._PDU_BYTES} bytes" in TEXT
    assert connections.MAX_PDU_BYTES == 1024 * 1024
    config = Config()
    for text in (
        f"request {connections.ACSE_S:.0f} s",
        f"TLS handshake {listener._HANDSHAKE_S:.0f} s",
        f"`pacs.pdu_timeout_s` ({config.pacs_pdu_timeout_s:.0f} s)",
        f"`pacs.min_rate_bytes_s` ({config.pacs_min_rate_bytes_s} bytes/s",
        f"`pacs.idle_timeout_s` ({config.pacs_idle_timeout_s:.0f} s)",
        f"| at most {reception._UNANSWERED};",
    ):
        assert text in TEXT, text


def test_the_senders_limits_and_answers_are_those_of_the_code():
    from lungwatch.daemon.pacs import commitment, destination, scu

    assert commitment.MOST_LOSSES == 3
    assert "after the third such report the delivery has failed" in TEXT
    assert destination.MAX_REFUSALS == 5
    assert "recorded as failed after the fifth" in TEXT
    assert (
        f"connection {scu._CONNECT_S:.0f} s, association {scu._ACSE_S:.0f} s, "
        f"message {scu._DIMSE_S:.0f} s"
    ) in TEXT
    assert f"0x{scu._DUPLICATE:04X}" in TEXT
    asked = inspect.getsource(scu.StorageScu._entity)
    assert "[ExplicitVRLittleEndian, ImplicitVRLittleEndian]" in asked
    assert "Explicit VR Little Endian, Implicit VR Little Endian" in TEXT
