"""Fixtures shared by all tests, and the check that no test leaks threads or descriptors."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import markers
from tests.support.leaks import leak_guard
from tests.support.postgres import find_programs, running

__all__ = ["leak_guard"]

# Before anything imports TensorFlow: its start-up chatter would bury a failure.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["MPLBACKEND"] = "Agg"
# One of several workers has one processor: pools for all of them would only stand in line.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    for _pool in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(_pool, "1")
# A busy machine is slow at times: no example fails for that.
settings.register_profile("lungwatch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lungwatch")
# A developer's own settings must not decide what a test sees.
for _name in [name for name in os.environ if name.startswith("LUNGWATCH_")]:
    if not _name.startswith("LUNGWATCH_TEST_"):
        del os.environ[_name]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no module all of whose tests `-m` leaves out: TensorFlow alone takes seconds."""
    if collection_path.suffix == ".py" and markers.is_left_out(
        collection_path, config.option.markexpr
    ):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests, before `-m` selects among them."""
    markers.apply(items)


def testdata(name: str) -> Path:
    """Return a file of pydicom or pydicom-data, without ever asking the network."""
    from pydicom.data import get_testdata_file

    found = get_testdata_file(name, download=False)
    if found is None:
        pytest.fail(f"{name} is missing: pydicom-data is not installed (extra 'demo')")
    return Path(str(found))


@pytest.fixture(scope="session")
def find_testdata() -> Callable[[str], Path]:
    """`find_testdata("RG1_UNCR.dcm")` is that file of pydicom or pydicom-data."""
    return testdata


@pytest.fixture(scope="session")
def rg1() -> Path:
    """A real adult chest radiograph: CR, 1955 x 1841, 15 bits, MONOCHROME1, uncompressed."""
    return testdata("RG1_UNCR.dcm")


@pytest.fixture(scope="session")
def rg1_lossless() -> Path:
    """The same radiograph, JPEG 2000 lossless."""
    return testdata("RG1_J2KR.dcm")


@pytest.fixture(scope="session")
def rg1_lossy() -> Path:
    """The same radiograph, JPEG 2000 lossy."""
    return testdata("RG1_J2KI.dcm")


@pytest.fixture(scope="session")
def rg3() -> Path:
    """A lower leg, which must never be scored: CR, BodyPartExamined EXTREMITY."""
    return testdata("RG3_UNCR.dcm")


@pytest.fixture(scope="session")
def ct() -> Path:
    """A CT slice, which must never be scored."""
    return testdata("693_UNCR.dcm")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which are not part of the repository."""
    folder = os.environ.get("LUNGWATCH_TEST_DATA")
    if not folder:
        pytest.skip("LUNGWATCH_TEST_DATA does not name the folder of the real data sets")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"LUNGWATCH_TEST_DATA is {folder}, which is no folder")
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL database for the tests: a given one, or one started for them."""
    given = os.environ.get("LUNGWATCH_TEST_POSTGRES")
    if given:
        yield given
        return
    pytest.importorskip("psycopg", reason="the extra 'postgres' is not installed")
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed, and LUNGWATCH_TEST_POSTGRES names none")
    with running(programs) as server:
        yield server.url


@pytest.fixture
def empty_postgres(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL database with nothing in it, this test's alone."""
    from sqlalchemy import text

    from lungwatch.db.engine import open_engine, writing

    # The parallel workers' common folder: a database that was given is one for them all.
    with (tmp_path_factory.getbasetemp().parent / "postgres.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine = open_engine(postgres)
        with writing(engine) as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        engine.dispose()
        yield postgres
