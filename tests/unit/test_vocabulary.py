"""Words and codes for body parts, views and species, in the languages of the files."""

import re
import tomllib
import unicodedata
from importlib import resources

import numpy as np
import pytest

from lungwatch.imaging.subject import part_of, view_of
from lungwatch.imaging.vocabulary import fold, readings, vocabulary
from tests.support.radiographs import radiograph

CHEST = """
CHEST|chest |Chest PA|PORT CHEST|CHEST_PORTABLE|CHEST1VIEW|CHESTPA|CHEST 2 VIEWS|CHEST,PA|CHEST-PA
THORAX AP|THORAX^PA|TÓRAX|TORAX PA Y LAT|2- TORAX|PECHO|PULMON|PULMÓN|PULMÃO|PEITO|TORACE|torace 2p
POLMONI|GABBIA TORACICA|POITRINE|POUMONS|THORAX DE FACE|CAGE THORACIQUE|BRUST|Brustkorb|LUNGE
HERZ-LUNGE|Bettthorax|THX|BORSTKAS|LONGEN|KLATKA PIERSIOWA PA|KLP|PŁUCA|PLUCA|HRUDNÍK|HRUDNIK|PLÍCE
GRUDNI KOŠ|PLUĆA|ГРУДНАЯ КЛЕТКА|Органы грудной клетки|ОГК|ЛЁГКИЕ|GRUDNAYA KLETKA|OGK|LUNGOR
BRÖSTKORG|LUNGER|BRYSTKASSE|KEUHKOT|RINTAKEHÄ|AKCİĞER|Akciğer|GÖĞÜS|GOGUS|PAAC|MELLKAS|TÜDŐ
ΘΩΡΑΚΑΣ|Θώρακος|ΠΝΕΥΜΟΝΕΣ|胸部|胸部正位|胸片|肺|흉부|가슴|흉부 X선|ทรวงอก|الصدر|חזה|NGỰC|DADA|CXR
CHEST WALL|LUNGS|CHEST (PORTABLE)|THORACIC|RIB CAGE|LUNG LEFT|THORAX 1|TORAKS|TORAX DE PIE
"""
ELSEWHERE = """
ABDOMEN|ABDOME|ABD|SKULL|Skull AP|CRÂNE|KNEE|KNEE LEFT|RODILLA|GENOU|KNIE|KOLANO|КОЛЕНО|HAND|MANO
MAIN|HÄNDE|PELVIS|BECKEN|BACINO|BASSIN|КИСТЬ|SPINE|TSPINE|THORACIC SPINE|SPINE, THORACIC|T-SPINE
LSPINE|COLUMNA DORSAL|COLUMNA TORACICA|COLONNE THORACIQUE|RACHIS DORSAL|BWS|BRUSTWIRBELSÄULE
KRĘGOSŁUP PIERSIOWY|ГРУДНОЙ ОТДЕЛ ПОЗВОНОЧНИКА|FOOT|PIE|PIED|FUSS|SHOULDER|HOMBRO|ÉPAULE|SCHULTER
CLAVICLE|ELBOW|EXTREMITY|LOWER EXTREMITY|LEG|LONG LEG|UPPER LIMB|HEAD|NECK|BREAST|MAMMA|STERNUM
FEMUR|HIP|JOELHO|QUADRIL|腹部|膝|頭部|手|胸椎|무릎|복부|PHANTOM|KUB|SINUSES|TEETH|ANKLE|WRIST
SCOLIOSIS|ESOPHAGUS|DIZ|KAFA|TÉRD|ΓΟΝΑΤΟ
"""
# Body parts of PS3.16 annex L that a CR or DX image may name.
DEFINED = """
ABDOMENPELVIS|ADRENAL|ANKLE|ANUS|ARM|AXILLA|BACK|BILEDUCT|BLADDER|BRAIN|BREAST|CALCANEUS|CALF|CSPINE
CTSPINE|CERVIX|CLAVICLE|COCCYX|COLON|DUODENUM|EAR|ELBOW|ESOPHAGUS|EXTREMITY|EYE|FACE|FEMUR|FINGER
FOOT|GALLBLADDER|HAND|HEAD|HEADNECK|HIP|HUMERUS|ILEUM|ILIUM|IAC|JAW|JEJUNUM|KIDNEY|KNEE|LARYNX|LIVER
LEG|LSPINE|LSSPINE|MAXILLA|MOUTH|NECK|NOSE|ORBIT|OVARY|PANCREAS|PATELLA|PELVIS|PHARYNX|PROSTATE
RECTUM|SSPINE|SCAPULA|SHOULDER|SKULL|SPINE|SPLEEN|STERNUM|STOMACH|TMJOINT|THIGH|TSPINE|TLSPINE|THUMB
THYROID|TOE|TONGUE|URETER|URETHRA|UTERUS|WRIST|ZYGOMA
"""
PARTLY = """
CHESTABDOMEN|CHEST ABDOMEN|CHESTABDPELVIS|RIB|RIBS|Rippen|COSTILLAS|HEART|HERZ|BABYGRAM|WHOLEBODY
TRUNK|NECKCHEST|CHEST AND KNEE|HEMITHORAX
"""
UNKNOWN = "|UNKNOWN|XYZ|BODY|OTHER|1|-|DEFAULT|PORTABLE"
FRONTAL = """
PA|AP|pa|P.A.|A.P.|P-A|A/P|PA_UPRIGHT|AP ERECT|AP SUPINE|AP PORTABLE|APSUPINE|PAUPRIGHT
POSTERO-ANTERIOR|POSTEROANTERIOR|ANTERIOR-POSTERIOR|ANTERO POSTERIOR|AP SEMI-ERECT|PA 2 VIEWS
FRONTAL|FRENTE|FACE|DE FACE|PA CHEST|CHEST_AP|THORAX PA|AP BED|AP SITTING|PA STANDING|PA INSPIRATION
p.a. stehend|AP LIEGEND|AP LIT|PA DEBOUT|PA DE PIE|AP DECUBITO SUPINO|AP DECÚBITO DORSAL|Frontale
PROIEZIONE AP|正位|后前位|胸部正位|正面|정면|PA Brust|ПРЯМАЯ|PA1|AP (PORTABLE)|PA VIEW
"""
DECUBITUS = """
LLD|RLD|AP LLD|PA RLD|LEFT LATERAL DECUBITUS|AP RIGHT LATERAL DECUBITUS|LAT DECUB|DECUBITUS
L LAT DECUB|LT LATERAL DECUBITUS|DECUB LEFT|AP DECUBITUS
"""
NOT_FRONTAL = """
LL|RL|LATERAL|LAT|L LAT|R LAT|LATERAL LEFT|LLAT|LAT_ERECT|LATERO-LATERAL|LEFT LATERAL|PA LAT
PA AND LATERAL|PROFIL|PERFIL|PROFILE|SEITLICH|OBLIQUE|LAO|RAO|LPO|RPO|LLO|RLO|AP OBLIQUE|SWIMMERS
XTABLE LATERAL|AP AXIAL|LORDOTIC|AP LORDOTIC|APICAL|CC|MLO|SUNRISE|DORSAL DECUBITUS
VENTRAL DECUBITUS|TANGENTIAL|AXIAL|BOCZNE|БОКОВАЯ|側面|侧位|측면|45 DEG|MERCHANT|LATERALE|L|R|OTHER
"""
UNSTATED = "|UNKNOWN|N/A|ERECT|SUPINE|PORTABLE|CHEST|-|UNK|NONE"


def _each(text: str) -> list[str]:
    return text.strip("\n").replace("\n", "|").split("|")


@pytest.mark.parametrize("text", _each(CHEST))
def test_a_chest_is_known_in_every_language(text: str) -> None:
    assert part_of(text) == "chest"


@pytest.mark.parametrize("text", _each(ELSEWHERE) + _each(DEFINED))
def test_another_part_is_known_in_every_language(text: str) -> None:
    assert part_of(text) not in ("chest", "partly_chest", "")


@pytest.mark.parametrize("text", _each(PARTLY))
def test_what_shows_the_chest_among_others_is_neither(text: str) -> None:
    assert part_of(text) == "partly_chest"


@pytest.mark.parametrize("text", UNKNOWN.split("|"))
def test_other_words_are_unknown(text: str) -> None:
    assert part_of(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "T RAX",
        "T?RAX",
        "T\ufffdRAX",
        "TÃ\x93RAX",
        "T\xa2RAX",
        "TRAX",
        "HRUDN?K",
        "AKC??ER",
        "PULM?ES",
    ],
)
def test_a_chest_is_known_without_its_accented_letters(text: str) -> None:
    assert part_of(text) == "chest"


@pytest.mark.parametrize(
    ("texts", "view"),
    [
        (_each(FRONTAL), "frontal"),
        (_each(DECUBITUS), "decubitus"),
        (_each(NOT_FRONTAL), "not_frontal"),
        (UNSTATED.split("|"), ""),
    ],
)
def test_views_are_told_by_what_is_allowed(texts: list[str], view: str) -> None:
    assert {text: view_of(text) for text in texts} == dict.fromkeys(texts, view)


@pytest.mark.parametrize(
    ("raw", "character_set", "part"),
    [
        ("ГРУДНАЯ КЛЕТКА".encode(), None, "chest"),
        ("ГРУДНАЯ КЛЕТКА".encode("iso8859_5"), "ISO_IR 144", "chest"),
        ("胸部".encode("gb18030"), "GB18030", "chest"),
        ("TÓRAX".encode(), None, "chest"),
        ("TÓRAX".encode("latin-1"), "ISO_IR 100", "chest"),
        ("膝".encode(), "ISO_IR 192", "leg"),
        ("TÓRAX".encode("cp850"), "KLINGON", "chest"),
    ],
)
def test_a_code_string_in_any_character_set(
    raw: bytes, character_set: str | None, part: str
) -> None:
    """VR CS has no character set; pydicom reads its bytes as Latin-1."""
    changes = {"SpecificCharacterSet": character_set} if character_set else {}
    dataset = radiograph(BodyPartExamined=raw.decode("latin-1"), **changes)
    assert part_of(*readings(dataset, "BodyPartExamined")) == part


def test_folding_leaves_words_alone() -> None:
    assert fold("  Tórax_2-PA,  İĞÜ ß Ł ") == ("TORAX", "PA", "IGU", "SS", "L")
    assert fold("123 .,-") == ()


def test_no_entry_is_its_own_contradiction() -> None:
    """Every entry, looked up as a text, means what its list says, or more than that."""

    text = resources.files("lungwatch.imaging").joinpath("vocabulary.toml").read_text("utf-8")
    data = tomllib.loads(text)
    for name in ("chest", "partly_chest"):
        for entry in data["body_part"][name]:
            assert part_of(entry.replace("*", "")) in ("chest", "partly_chest"), entry
    for name, entries in data["body_part"]["elsewhere"].items():
        for entry in entries:
            assert part_of(entry.replace("*", "")) not in ("chest", "partly_chest", ""), (
                name,
                entry,
            )


def test_no_code_has_two_meanings() -> None:
    codes = vocabulary().body_part_codes, vocabulary().view_codes
    assert not set(codes[0]) & set(codes[1])
    for meanings in codes:
        assert all(re.fullmatch(r"\d{5,}|[A-Z]-[0-9A-Z]{4,5}", value) for value in meanings)


def test_a_long_text_takes_no_longer() -> None:
    assert part_of("CHEST " * 100_000) == "chest"
    assert part_of("é" * 100_000) == ""


def test_any_text_has_a_meaning() -> None:
    rng = np.random.default_rng(7)
    for _ in range(300):
        text = "".join(map(chr, rng.integers(1, 0x3000, 20)))
        assert isinstance(part_of(text), str)
        assert isinstance(view_of(unicodedata.normalize("NFD", text)), str)
