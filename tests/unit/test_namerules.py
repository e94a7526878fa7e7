"""Name rules: skipped names in the drop folder, and names of archive members."""

import pytest

from lungwatch.daemon.configfile import load_config
from lungwatch.daemon.intake.archives import MemberNames
from lungwatch.daemon.intake.eligibility import NameKind, NameRules
from lungwatch.errors import ConfigError

LITTER = (
    "@eaDir", "@EADIR", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information",
    "Thumbs.db", "THUMBS.DB", "desktop.ini", "Desktop.ini", ".DS_Store", "._image.dcm",
    "~$befund.docx", ".~lock.befund.odt#", ".Trash-1000", ".Trashes", "lost+found", "@Recycle",
    ".nfs00000000017a", ".fuse_hidden0000", ".@__thumb", "SYNOPHOTO@SynoResource", "ehthumbs.db",
)  # fmt: skip
UNFINISHED = (
    "a.part", "a.dcm.PART", "a.filepart", "a.crdownload", "a.opdownload", "a.uploading", "a.!sync",
    "study.download", "a.partial", "IM0001.TMP", "scan~", ".dcm", ".in.a.dcm.", ".a.dcm.Xq3Z2a",
    "a.!ut", "a.aria2", "a.swp",
)  # fmt: skip
TAKEN = (
    "IM0001", "image.dcm", "Thumbs.db.dcm", "eaDir", "part", "a.part.dcm", "tmp.dcm", "I1000000",
    "$R7A2B3C.dcm", "~1.dcm", "#1.png", "@home.dcm", "recycle.png", "desktop.ini.png", "1.2.840.1",
    "Trash.dcm", "x.download.png", "[a-z].png",
)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "kind"), [(LITTER, NameKind.LITTER), (UNFINISHED, NameKind.UNFINISHED), (TAKEN, None)]
)
def test_names_are_told_apart(names, kind):
    rules = {name: NameRules().rule_for(name) for name in names}
    assert {name: rule and rule.kind for name, rule in rules.items()} == dict.fromkeys(names, kind)


def test_the_lists_are_the_configuration_s_and_a_dot_always_hides(tmp_path):
    environ = {
        "LUNGWATCH_IGNORED_NAMES": "cache*,@eaDir",
        "LUNGWATCH_UNFINISHED_NAMES": "*.Sending",
    }
    rules = load_config(None, tmp_path, environ).name_rules
    found = {
        name: rules.rule_for(name)
        for name in ("Cache 1", "@eadir", "x.SENDING", ".x", "x.part", "Thumbs.db")
    }
    assert {name: rule and rule.pattern for name, rule in found.items()} == {
        "Cache 1": "cache*",
        "@eadir": "@eaDir",
        "x.SENDING": "*.Sending",
        ".x": ".*",
        "x.part": None,
        "Thumbs.db": None,
    }


@pytest.mark.parametrize("key", ["ignored_names", "unfinished_names"])
def test_a_pattern_with_which_nothing_would_be_taken_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match=key):
        load_config(None, tmp_path, {f"LUNGWATCH_{key.upper()}": "*.part,*"})


def test_members_keep_what_is_harmless_of_their_names():
    name_of = MemberNames(NameRules())
    hostile = "\x1b]0;x\x07\u202egnp.exe\n"
    names = [
        name_of(member)
        for member in (
            "study/IM0001", "other/IM0001", "third/im0001", "a/Müller 胸片 (1).dcm",
            "..\\..\\x.png", "/etc/passwd", "-rf", ". .hidden", "a.part", "a.part", hostile,
            "x" * 300 + ".dcm", "胸" * 100,
            "   ", "1.2.840.10008.1234567890123", "CON\0.png", "~$x", "$(x)`;.png",
        )
    ]  # fmt: skip
    assert names == [
        "IM0001", "IM0001-2", "im0001-3", "Müller 胸片 (1).dcm", "x.png",
        "passwd", "rf", "hidden", "a.part_", "a-2.part_", "__0_x__gnp.exe_", "x" * 150 + ".dcm",
        "胸" * 50, "file", "1.2.840.10008.1234567890123", "CON_.png", "__x", "_(x)__.png",
    ]  # fmt: skip
    assert all(c.isalnum() or c in "._-() " for name in names for c in name)
