"""Subject of DICOM files, from strings, codes and descriptions."""

import contextlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    EncapsulatedPDFStorage,
    SecondaryCaptureImageStorage,
    XRayAngiographicImageStorage,
)

from lungwatch.errors import FileRejected, Flag, Reason
from lungwatch.imaging.radiograph import ReadPolicy
from lungwatch.imaging.reader import read_radiograph
from tests.support.radiographs import code, radiograph, read

DX = {
    "SOPClassUID": DigitalXRayImageStorageForPresentation,
    "Modality": "DX",
    "PresentationIntentType": "FOR PRESENTATION",
}
CAPTURE = {"SOPClassUID": SecondaryCaptureImageStorage}


def _refusal(dataset: Dataset, tmp_path: Path, policy: ReadPolicy | None = None) -> Reason:
    with pytest.raises(FileRejected) as caught:
        read(dataset, tmp_path, policy)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def _nested_view(*modifier: str) -> list[Dataset]:
    view = code("399348003", "SCT", "antero-posterior")
    view[0].ViewModifierCodeSequence = code(*modifier)
    return view


class TestView:
    @pytest.mark.parametrize(
        "view",
        [
            ("399067008", "SCT", "lateral"),
            ("399173006", "SCT", "left lateral"),
            ("399173006", "SCT", ""),
            ("R-10236", "SRT", "left lateral"),
            ("R-10232", "99SDM", "right lateral"),
            ("R-102CD", "SNM3", ""),
            ("399135007", "SCT", "left anterior oblique"),
            ("LAT1", "99HOSPITAL", "Thorax seitlich"),
            ("V7", "L", "Perfil izquierdo"),
            ("", "", "lateral"),
            ("399348003", "SCT", "lateral"),
        ],
    )
    def test_a_view_code_that_is_not_frontal_is_refused(
        self, tmp_path: Path, view: tuple[str, str, str]
    ) -> None:
        dataset = radiograph(**DX, ViewPosition=None, ViewCodeSequence=code(*view))
        assert _refusal(dataset, tmp_path) is Reason.NOT_FRONTAL
        # Nor does a position that says otherwise help.
        dataset = radiograph(**DX, ViewCodeSequence=code(*view))
        assert _refusal(dataset, tmp_path) is Reason.NOT_FRONTAL

    @pytest.mark.parametrize(
        "view",
        [
            ("399348003", "SCT", "antero-posterior"),
            ("272479007", "SCT", "postero-anterior"),
            ("R-10206", "SRT", "antero-posterior"),
            ("R-10214", "SNM3", "postero-anterior"),
            ("399033003", "SCT", "frontal"),
            ("17", "99HOSPITAL", "Thorax p.a."),
        ],
    )
    def test_a_frontal_view_code_is_enough(
        self, tmp_path: Path, view: tuple[str, str, str]
    ) -> None:
        dataset = radiograph(**DX, ViewPosition=None, ViewCodeSequence=code(*view))
        assert read(dataset, tmp_path).flags == ()

    def test_a_view_without_words_or_codes_is_unknown(self, tmp_path: Path) -> None:
        for value in (None, "", "UNKNOWN", "ERECT"):
            dataset = radiograph(ViewPosition=value, ViewCodeSequence=[])
            assert read(dataset, tmp_path).flags == (Flag.VIEW_UNKNOWN,), value

    def test_a_named_projection_is_no_ordinary_one(self, tmp_path: Path) -> None:
        dataset = radiograph(
            ProjectionEponymousNameCodeSequence=code("277046008", "SCT", "Lindblom method")
        )
        assert _refusal(dataset, tmp_path) is Reason.NOT_FRONTAL

    @pytest.mark.parametrize("modifier", [("260450008", "SCT", "lordotic"), ("111069", "DCM", "")])
    def test_a_modifier_makes_a_view_oblique(
        self, tmp_path: Path, modifier: tuple[str, str, str]
    ) -> None:
        dataset = radiograph(ViewCodeSequence=_nested_view(*modifier))
        assert _refusal(dataset, tmp_path) is Reason.NOT_FRONTAL

    @pytest.mark.parametrize(
        "changes",
        [
            {"ViewPosition": "LLD"},
            {"ViewPosition": "AP RLD"},
            {"ViewPosition": "AP", "PatientPosition": "HFDL"},
            {"ViewCodeSequence": _nested_view("102536004", "SCT", "left lateral decubitus")},
            {"SeriesDescription": "CHEST AP LEFT DECUB"},
        ],
    )
    def test_decubitus_is_scored_and_flagged(
        self, tmp_path: Path, changes: dict[str, object]
    ) -> None:
        assert read(radiograph(**changes), tmp_path).flags == (Flag.DECUBITUS,)

    @pytest.mark.parametrize(
        "orientation", [["A", "F"], ["P", "F"], ["PL", "F"], ["AR", "FP"], ["L", "P"], ["F", "A"]]
    )
    def test_a_lateral_runs_front_to_back(self, tmp_path: Path, orientation: list[str]) -> None:
        dataset = radiograph(ViewPosition=None, PatientOrientation=orientation)
        assert _refusal(dataset, tmp_path) is Reason.NOT_FRONTAL

    def test_the_policy_lets_laterals_pass_and_knows_more_positions(self, tmp_path: Path) -> None:
        changes = {"ViewPosition": "LL", "PatientOrientation": ["A", "F"]}
        changes["ViewCodeSequence"] = code("399067008", "SCT", "lateral")
        lenient = ReadPolicy(reject_lateral=False)
        assert read(radiograph(**changes), tmp_path, lenient).meta.view_position == "LL"
        dataset = radiograph(ViewPosition="Raum-3")
        assert _refusal(dataset, tmp_path) is Reason.NOT_FRONTAL
        local = ReadPolicy(view_positions=frozenset({"RAUM-3"}))
        assert read(dataset, tmp_path, local).flags == ()
        dataset = radiograph(ViewPosition="", ViewCodeSequence=code("3", "L", "Raum 3"))
        assert read(dataset, tmp_path, local).flags == ()


class TestBodyPart:
    @pytest.mark.parametrize(
        "region",
        [
            ("72696002", "SCT", "Knee region structure"),
            ("818981001", "SCT", "Abdomen"),
            ("69536005", "SCT", ""),
            ("T-D9200", "SRT", "Knee"),
            ("T-D4000", "99SDM", ""),
            ("T-11502", "SNM3", "Thoracic spine"),
            ("28", "99HOSPITAL", "Handgelenk links"),
        ],
    )
    def test_a_region_code_elsewhere_is_refused(
        self, tmp_path: Path, region: tuple[str, str, str]
    ) -> None:
        for part in (None, "CHEST"):
            dataset = radiograph(BodyPartExamined=part, AnatomicRegionSequence=code(*region))
            assert _refusal(dataset, tmp_path) is Reason.WRONG_BODY_PART

    @pytest.mark.parametrize(
        "region",
        [
            ("816094009", "SCT", "Chest"),
            ("51185008", "SCT", "Thorax"),
            ("T-D3000", "SRT", ""),
            ("39607008", "SCT", "Lung structure"),
            ("5", "99HOSPITAL", "Thorax im Bett"),
        ],
    )
    def test_a_region_code_of_the_chest_is_enough(
        self, tmp_path: Path, region: tuple[str, str, str]
    ) -> None:
        dataset = radiograph(BodyPartExamined=None, AnatomicRegionSequence=code(*region))
        assert read(dataset, tmp_path).flags == ()

    @pytest.mark.parametrize("part", [None, "", "UNKNOWN", "RIB", "HEART", "CHESTABDOMEN"])
    def test_what_may_show_the_lungs_goes_on_with_a_flag(
        self, tmp_path: Path, part: str | None
    ) -> None:
        flags = read(radiograph(BodyPartExamined=part), tmp_path).flags
        assert flags == (Flag.BODY_PART_UNKNOWN,)

    def test_a_site_adds_its_own_words(self, tmp_path: Path) -> None:
        dataset = radiograph(BodyPartExamined="Skull-Room")
        assert _refusal(dataset, tmp_path) is Reason.WRONG_BODY_PART
        local = ReadPolicy(body_parts=frozenset({"SKULL-ROOM"}))
        assert read(dataset, tmp_path, local).flags == ()


class TestSpecies:
    @pytest.mark.parametrize(
        "changes",
        [
            {"PatientSpeciesCodeSequence": code("448771007", "SCT", "Canis lupus familiaris")},
            {"PatientSpeciesCodeSequence": code("L-80700", "SRT", "")},
            {"PatientSpeciesCodeSequence": code("", "", "Felis catus")},
            {"PatientSpeciesDescription": "Canine"},
            {"PatientSpeciesDescription": "NON-HUMAN PRIMATE"},
            {"PatientBreedDescription": "Beagle"},
            {"PatientBreedCodeSequence": code("132591006", "SCT", "Labrador retriever")},
            {"ResponsiblePersonRole": "OWNER"},
            {"PatientSexNeutered": "ALTERED"},
            {"AnatomicalOrientationType": "QUADRUPED"},
        ],
    )
    def test_an_animal_is_refused(self, tmp_path: Path, changes: dict[str, object]) -> None:
        assert _refusal(radiograph(**changes), tmp_path) is Reason.NOT_HUMAN

    @pytest.mark.parametrize(
        "changes",
        [
            {"PatientSpeciesCodeSequence": code("337915000", "SCT", "Homo sapiens")},
            {"PatientSpeciesCodeSequence": code("L-85B00", "SRT", "homo sapiens")},
            {"PatientSpeciesCodeSequence": [Dataset()]},
            {"PatientSpeciesDescription": "Mensch"},
            {"PatientSpeciesDescription": "humano"},
            {"PatientSpeciesDescription": "N/A"},
            {"PatientBreedDescription": ""},
            {"ResponsiblePersonRole": "PARENT"},
            {"AnatomicalOrientationType": "BIPED"},
        ],
    )
    def test_a_human_is_not(self, tmp_path: Path, changes: dict[str, object]) -> None:
        assert read(radiograph(**changes), tmp_path).flags == ()


class TestKindOfImage:
    @pytest.mark.parametrize(
        "changes",
        [
            {**CAPTURE, "Modality": "DX", "ConversionType": "WSD"},
            {**CAPTURE, "Modality": "DX", "ConversionType": "DF"},
            {**CAPTURE, "Modality": "CR", "ConversionType": "WSD", "BodyPartExamined": None},
            {**CAPTURE, "Modality": "CR", "ConversionType": "SD", "ViewPosition": None},
            {**CAPTURE, "Modality": "CR", "ImageType": ["DERIVED", "SECONDARY"]},
            {**DX, "SOPClassUID": XRayAngiographicImageStorage},
            {"SOPClassUID": EncapsulatedPDFStorage},
            {**DX, "ImageType": ["DERIVED", "SECONDARY"], "ConversionType": "WSD"},
            {**DX, "QualityControlImage": "YES"},
            {"ImageType": ["DERIVED", "SECONDARY", "RESULT"]},
            {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
            {"ImageType": ["DERIVED", "PRIMARY", "", "BONE"]},
            {"ImageType": ["DERIVED", "PRIMARY", "ENERGY_SUBTRACTED", "SOFT_TISSUE"]},
            {"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS"]},
            {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
            {"ImageType": ["DERIVED", "SECONDARY", "AI"]},
            {"DerivationDescription": "Bone suppressed image"},
            {"DerivationCodeSequence": code("113062", "DCM", "Pixel by pixel subtraction")},
        ],
    )
    def test_what_is_no_radiograph_is_refused(
        self, tmp_path: Path, changes: dict[str, object]
    ) -> None:
        assert _refusal(radiograph(**changes), tmp_path) is Reason.NOT_A_RADIOGRAPH

    @pytest.mark.parametrize(
        "changes",
        [
            {"ImageType": None},
            {"ImageType": ["DERIVED", "PRIMARY"]},
            {"ImageType": ["DERIVED", "PRIMARY", "POST_PROCESSED", "", "RT", "100000"]},
            {"ImageType": ["DERIVED", "SECONDARY"], "LossyImageCompression": "01"},
            {"DerivationDescription": "JPEG 2000, ratio 10:1"},
            {**DX},
            {**DX, "QualityControlImage": "NO"},
            # Digitised film, and exported radiographs that have kept their part and view.
            {**CAPTURE, "Modality": "RG", "ConversionType": "DF", "ViewPosition": "AP"},
            {**CAPTURE, "Modality": "CR", "ConversionType": "WSD", "ImageType": None},
            {"SOPClassUID": "1.2.392.200036.9125.1.1.2"},
        ],
    )
    def test_a_radiograph_in_any_dress_is_read(
        self, tmp_path: Path, changes: dict[str, object]
    ) -> None:
        assert read(radiograph(**changes), tmp_path).flags == ()


class TestDescriptions:
    @pytest.mark.parametrize(
        ("keyword", "text"),
        [
            ("PerformedProcedureStepDescription", "KNEE, AP/OBL"),
            ("PerformedProcedureStepDescription", "CHEST, LATERAL"),
            ("SeriesDescription", "CHEST LAT"),
            ("SeriesDescription", "Thorax seitl. / seitlich"),
            ("AcquisitionDeviceProcessingDescription", "CHEST,LAT"),
            ("ProtocolName", "W034 Rodilla AP"),
            ("StudyDescription", "XR ABDOMEN 1 VIEW"),
            ("RequestedProcedureDescription", "Röntgen LWS"),
            ("SeriesDescription", "Chest bone suppressed"),
            ("AcquisitionDeviceProcessingDescription", "CANINE THORAX"),
        ],
    )
    def test_one_that_disagrees_is_a_flag(self, tmp_path: Path, keyword: str, text: str) -> None:
        dataset = radiograph(**{keyword: text})
        assert read(dataset, tmp_path).flags == (Flag.DESCRIPTION_DISAGREES,)

    def test_a_procedure_code_that_disagrees_is_a_flag(self, tmp_path: Path) -> None:
        dataset = radiograph(ProcedureCodeSequence=code("36687-2", "LN", "XR Knee 2 views"))
        assert read(dataset, tmp_path).flags == (Flag.DESCRIPTION_DISAGREES,)

    def test_so_is_a_request_that_disagrees(self, tmp_path: Path) -> None:
        request = Dataset()
        request.ScheduledProcedureStepDescription = "Foot left"
        dataset = radiograph(RequestAttributesSequence=[request])
        assert read(dataset, tmp_path).flags == (Flag.DESCRIPTION_DISAGREES,)

    @pytest.mark.parametrize(
        "text",
        [
            "XR CHEST PA AND LATERAL",
            "CHEST 2V FRONTAL/LATL",
            "Thorax p.a. und seitlich",
            "PORTABLE CHEST, NG TUBE, ABD",
            "TRAUMA SERIES: CHEST PELVIS C-SPINE",
            "ROUTINE",
            "Preop",
            "Lungen a.p. liegend",
            "",
        ],
    )
    def test_one_that_does_not_disagree_is_none(self, tmp_path: Path, text: str) -> None:
        dataset = radiograph(StudyDescription=text, SeriesDescription=text)
        assert read(dataset, tmp_path).flags == ()


def test_damaged_sequences_are_read_or_refused(tmp_path: Path) -> None:
    dataset = radiograph(ViewCodeSequence=code("399348003", "SCT", "x" * 40))
    path = tmp_path / "whole"
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    data = path.read_bytes()
    start = data.index(b"\x54\x00\x20\x02")
    rng = np.random.default_rng(3)
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(start + 4, start + 80, 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(FileRejected):
            assert np.isfinite(read_radiograph(path).pixels).all()
