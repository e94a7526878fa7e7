"""Bundle policy: daemon and doctor run a model signed with a trusted key and refuse others."""

import json

import pytest


@pytest.fixture
def signed(make_home, newer_bundle):
    """A home with a key pair and a bundle, not signed yet."""
    home = make_home()
    bundle = newer_bundle.rename(newer_bundle.parent / "guided-1.1.0")
    assert home.command("model", "keygen", "key", with_home=False).returncode == 0
    home.env |= {"TRUSTED_KEYS": "key.pub", "MODEL": str(bundle)}
    return home, bundle


def test_what_nobody_trusted_signed_is_refused_before_anything_is_claimed(signed, picture):
    home, bundle = signed
    home.drop("x.png", picture(1), old=True)
    started = home.run_once()
    assert started.returncode == 1
    (line,) = started.stderr.splitlines()
    assert line.startswith("lungwatch: error: the model bundle ")
    assert "not signed" in line
    assert "lungwatch model sign" in line
    assert (home.incoming / "x.png").is_file()
    checked = home.command("doctor", "--json")
    assert checked.returncode == 1
    checks = {check["name"]: check for check in json.loads(checked.stdout)}
    assert checks["trusted keys"]["ok"] is True
    assert {name for name, check in checks.items() if check["ok"] is False} == {
        "model",
        "synthetic X-ray",
    }
    assert "not signed" in checks["model"]["detail"]
    assert home.command(
        "model", "sign", str(bundle), "--key", "key", with_home=False
    ).returncode == 0  # fmt: skip
    started = home.run_once()
    assert started.returncode == 0, started.stderr
    assert home.row(picture(1)).state == "done"


def test_without_trusted_keys_the_doctor_says_so_and_the_shipped_model_needs_no_signature(
    make_home,
):
    home = make_home()
    assert home.command("model", "keygen", "key", with_home=False).returncode == 0
    checks = {
        trusted: json.loads(home.command("doctor", "--json", env={"TRUSTED_KEYS": trusted}).stdout)
        for trusted in ("", "key.pub")
    }
    hints = {
        trusted: next(check for check in found if check["name"] == "trusted keys")
        for trusted, found in checks.items()
    }
    assert hints[""]["ok"] is None
    assert "not set" in hints[""]["detail"]
    assert hints["key.pub"]["ok"] is True
    assert not [check for found in checks.values() for check in found if check["ok"] is False]
