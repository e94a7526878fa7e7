"""The numbers in the filter of system calls, and what a decoder's environment keeps."""

import re
from pathlib import Path

import pytest

from lungwatch.daemon.pipeline import confinement, decode

# What the kernel's headers give: asm-generic is what aarch64 uses.
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_system_calls_are_the_kernel_s(machine):
    """A call that the headers lack has no number; 3264 marks what 32-bit systems name otherwise."""
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} (linux-libc-dev) is not installed")
    lines = HEADERS[machine].read_text()
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)\s*$", lines, re.MULTILINE)
    kernel = {name: int(number) for name, number in found}
    ours = {
        **confinement._ALLOWED,
        **confinement._HOSTILE,
        **confinement._MAPPING,
        "tgkill": confinement._TGKILL,
        "seccomp": confinement._SECCOMP,
    }
    column = confinement._ARCHITECTURES[machine][0]
    assert len(ours) > 70
    assert {name: numbers[column] for name, numbers in ours.items()} == {
        name: kernel.get(name) for name in ours
    }


def test_a_decoder_gets_what_chooses_instructions_and_no_secret(monkeypatch):
    """OPENBLAS_CORETYPE decides the last digits of a sum: it is the same in every process."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("LUNGWATCH_DATABASE_PASSWORD", "secret")
    found = decode._environment()
    assert found["OPENBLAS_CORETYPE"] == "Haswell"
    assert "secret" not in found.values()
