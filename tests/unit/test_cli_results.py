"""The commands that query: what they print, what they refuse, and how."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lungwatch import RESEARCH_USE_ONLY, __version__
from lungwatch.attributes import RadiographMeta
from lungwatch.cli.main import COMMANDS, main
from lungwatch.cli.options import parse_since, parse_until
from lungwatch.cli.output import cell_text, to_csv, to_json
from lungwatch.db.engine import open_engine, writing
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import Plausibility, State
from lungwatch.db.results import Store
from lungwatch.errors import Flag, visible
from lungwatch.models import SHIPPED_DEFAULT
from tests.support.rows import drop, record

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SHA = "ab" * 32
FIELDS = {
    *("id", "sha256", "source_name", "status", "reason", "label", "probability", "threshold"),
    *("flags", "model", "model_version", "overlay", "patient_id", "study_uid", "series_uid"),
    *("sop_uid", "accession", "received_at", "finished_at", "duration_ms"),
    *("uncertain_from", "uncertain_to", "gate_score", "lung_area", "lung_share"),
    *("calibration", "message", "findings", "station", "view"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One scored and one rejected image."""
    path = tmp_path_factory.mktemp("template") / "lungwatch.db"
    engine = open_database(f"sqlite:///{path}")
    store = Store(engine)
    model_id = store.register_model(
        name="baseline", version="1.0", sha256="1" * 64, contract_json="{}", now=T0
    )
    for number, (name, sha256) in enumerate(
        [("=cmd|calc.dcm", SHA), ("a\x1b[31m long name that must be there whole.dcm", "cd" * 32)]
    ):
        claim = store.claim(
            drop(
                token=str(number),
                sha256=sha256,
                source_name=name,
                path=f"work/{number}/x.dcm",
                model_id=model_id,
                now=T0 + timedelta(days=number),
            )
        )
        if number:
            store.end(
                State.REJECTED,
                result_id=claim.result_id,
                reason="truncated",
                message="it ends in the middle",
                meta=None,
                duration_ms=1,
                now=T0,
                plausibility=Plausibility(gate_score=0.125, lung_area=0.0),
            )
            continue
        record(
            store,
            claim.result_id,
            meta=RadiographMeta(
                format="DICOM",
                rows=1,
                columns=2,
                bits_stored=12,
                photometric="MONOCHROME2",
                patient_id="+P1",
                study_uid="1.2.3",
                view_position="PA",
                station="ROOM1",
            ),
            probability=0.98765,
            logit=-2.5,
            flags=["low_detail", "old_model"],
            duration_ms=5,
            now=T0,
            uncertain=(0.25, 0.75),
            plausibility=Plausibility(gate_score=0.875, lung_area=0.375, lung_share=0.5),
            findings={"covid": 0.98765, "opacity": 0.625},
        )
        store.finish(result_id=claim.result_id, path="done/x.dcm", now=T0)
    engine.dispose()
    return path


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(template, home / "lungwatch.db")
    return home


Run = Callable[..., Result]


@pytest.fixture
def run(home: Path) -> Run:
    """Run a command on the home; stdout and stderr apart."""

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, [*arguments, "--home", str(home)])

    return invoke


@pytest.fixture(autouse=True)
def _fixed_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seven hours east, like nobody's build machine."""
    import time

    monkeypatch.setenv("TZ", "UTC-7")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


class TestList:
    def test_json_has_the_agreed_fields_newest_first(self, run: Run, home: Path) -> None:
        result = run("results", "list", "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        rows = json.loads(result.stdout)
        assert [row["id"] for row in rows] == [2, 1]
        assert set(rows[0]) >= FIELDS
        assert {name: rows[1][name] for name in ("status", "label", "probability", "flags")} == {
            "status": "done",
            "label": "COVID",
            "probability": 0.98765,
            "flags": ["low_detail", "old_model"],
        }
        assert rows[1]["overlay"] == str(home / "overlays/x.png")
        assert rows[1]["file"] == str(home / "done/x.dcm")
        assert datetime.fromisoformat(rows[1]["received_at"]) == T0
        assert datetime.fromisoformat(rows[1]["received_at"]).tzinfo is not None
        assert (rows[0]["reason"], rows[0]["probability"]) == ("truncated", None)
        assert rows[1]["findings"] == {"covid": 0.98765, "opacity": 0.625}
        assert rows[0]["findings"] is None
        assert [rows[1][name] for name in ("patient_id", "view", "station")] == [
            "+P1",
            "PA",
            "ROOM1",
        ]
        assert rows[0]["view"] is None
        trust = ("gate_score", "lung_area", "lung_share", "uncertain_from", "uncertain_to")
        assert [rows[1][name] for name in trust] == [0.875, 0.375, 0.5, 0.25, 0.75]
        assert [rows[0][name] for name in trust] == [0.125, 0.0, None, None, None]

    def test_the_table_is_whole_and_cannot_steer_the_terminal(self, run: Run, home: Path) -> None:
        result = run("results", "list")
        assert result.exit_code == 0
        heads, _, rejected, done, _, note = result.stdout.splitlines()
        assert heads.split() == [
            *("id", "file", "status", "label", "probability", "reason", "flags", "model"),
            *("received", "pacs", "overlay"),
        ]
        assert "a\\x1b[31m long name that must be there whole.dcm" in rejected
        assert "truncated" in rejected
        assert "low_detail old_model" in done
        assert str(home / "overlays/x.png") in done
        assert "0.988" in done
        assert "2026-03-01 19:00:00+07:00" in done
        assert "\x1b" not in result.stdout
        assert note == RESEARCH_USE_ONLY

    def test_csv_is_no_formula(self, run: Run) -> None:
        rows = list(csv.DictReader(io.StringIO(run("results", "list", "--csv").stdout)))
        assert [row["id"] for row in rows] == ["2", "1"]
        assert rows[1]["source_name"] == "'=cmd|calc.dcm"
        assert rows[1]["patient_id"] == "'+P1"
        assert rows[1]["flags"] == "low_detail;old_model"
        assert rows[1]["probability"] == "0.98765"
        assert rows[0]["label"] == ""
        assert json.loads(rows[1]["findings"]) == {"covid": 0.98765, "opacity": 0.625}
        assert rows[0]["findings"] == ""
        assert (rows[1]["lung_share"], rows[0]["gate_score"]) == ("0.5", "0.125")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--label", "covid"], [1]),
            (["--label", "negative"], []),
            (["--flag", "LOW_DETAIL"], [1]),
            (["--flag", "not_gated"], []),
            (["--status", "rejected"], [2]),
            (["--flag", "low_detail"], [1]),
            (["--min-score", "0.5", "--max-score", "1"], [1]),
            (["--max-score", "0.5"], []),
            (["--finding", "opacity", "--max-score", "0.7"], [1]),
            (["--finding", "Opacity", "--min-score", "0.7"], []),
            (["--finding", "nodule"], []),
            (["--patient", "+P1"], [1]),
            (["--accession", "none"], []),
            (["--study", "1.2.3"], [1]),
            (["--model", "baseline-1.0"], [2, 1]),
            (["--limit", "1"], [2]),
            (["--since", "2026-03-02"], [2]),
            (["--until", "2026-03-01"], [1]),
            (["--since", "2026-03-01T19:00", "--until", "2026-03-01T19:01"], [1]),
            (["--since", "2026-03-01T12:00:01Z"], [2]),
        ],
        ids=str,
    )
    def test_options_choose(self, run: Run, options: list[str], expected: list[int]) -> None:
        result = run("results", "list", "--json", *options)
        assert [row["id"] for row in json.loads(result.stdout)] == expected

    @pytest.mark.parametrize(
        "options",
        [
            ["--since", "yesterday"],
            ["--since", "2026-02-30"],
            ["--since", "999999w"],
            ["--min-score", "1.5"],
            ["--limit", "0"],
            ["--status", "lost"],
            ["--label", "FLU"],
            ["--label", "normal"],
            ["--flag", "low_contrast"],
            ["--finding", 'x"; --'],
            ["--json", "--csv"],
        ],
        ids=" ".join,
    )
    def test_bad_options_are_usage_errors(self, run: Run, options: list[str]) -> None:
        result = run("results", "list", *options)
        assert result.exit_code == 2
        assert "Error: " in result.stderr
        assert result.stdout == ""

    def test_a_flag_that_is_none_comes_with_the_nearest_and_the_help_lists_all(
        self, run: Run
    ) -> None:
        refused = run("results", "list", "--flag", "low_detial")
        assert "there is no flag 'low_detial'; did you mean low_detail? `--help`" in refused.stderr
        for command in ("list", "export", "stats"):
            told = " ".join(run("results", command, "--help").stdout.split())
            assert ", ".join(Flag) in told

    def test_the_former_name_of_a_label_leads_to_the_present_one(self, run: Run) -> None:
        refused = run("results", "list", "--label", "Normal")
        assert "the label NORMAL is called NEGATIVE: no COVID pattern seen" in refused.stderr

    def test_no_match_is_no_error(self, run: Run) -> None:
        assert run("results", "list", "--patient", "x", "--json").stdout == "[]\n"
        assert run("results", "list", "--patient", "x").stdout == "No results.\n"
        assert run("results", "list", "--patient", "x", "--csv").stdout.count("\n") == 1


class TestShow:
    def test_one_result_whole(self, run: Run, home: Path) -> None:
        shown = json.loads(run("results", "show", SHA[:8], "--json").stdout)
        assert (shown["id"], shown["logit"], shown["model_sha256"]) == (1, -2.5, "1" * 64)
        assert (shown["columns"], shown["overlay"]) == (2, str(home / "overlays/x.png"))

    def test_findings_are_told_by_name(self, run: Run) -> None:
        shown = run("results", "show", "1").stdout.splitlines()
        (line,) = [line for line in shown if line.startswith("findings")]
        assert line.split(maxsplit=1)[1] == "covid 0.98765, opacity 0.625"

    def test_for_people(self, run: Run) -> None:
        lines = run("results", "show", "2").stdout.splitlines()
        fields = dict(line.split(maxsplit=1) for line in lines if line and line != lines[-1])
        assert fields["message"] == "it ends in the middle"
        assert fields["probability"] == "-"
        assert lines[-1] == RESEARCH_USE_ONLY

    def test_an_unknown_one_is_one_clear_line(self, run: Run) -> None:
        result = run("results", "show", "99")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("lungwatch: error: no result '99'")
        assert result.stderr.count("\n") == 1


class TestExport:
    def test_json_and_csv_hold_what_list_prints(self, run: Run, tmp_path: Path) -> None:
        for kind in ("json", "csv"):
            path = tmp_path / f"out.{kind}"
            result = run("results", "export", "-o", str(path), "--label", "COVID")
            assert (result.exit_code, result.stdout) == (0, f"1 results written to {path}\n")
            listed = run("results", "list", f"--{kind}", "--label", "COVID").stdout
            assert path.read_text() == listed

    def test_another_ending_is_a_usage_error(self, run: Run, tmp_path: Path) -> None:
        result = run("results", "export", "-o", str(tmp_path / "out.xlsx"))
        assert result.exit_code == 2
        assert "must end in .csv or .json" in result.stderr
        assert not (tmp_path / "out.xlsx").exists()

    def test_a_missing_folder_is_one_clear_line(self, run: Run, tmp_path: Path) -> None:
        result = run("results", "export", "-o", str(tmp_path / "missing" / "out.csv"))
        assert result.exit_code == 1
        assert "cannot write" in result.stderr
        assert result.stderr.count("\n") == 1


class TestStats:
    def test_json(self, run: Run) -> None:
        counted = json.loads(run("results", "stats", "--json").stdout)
        assert (counted["results"], counted["arrivals"]) == (2, 2)
        assert counted["by_status"] == {"rejected": 1, "done": 1}
        assert counted["by_day"] == {"2026-03-01": 1, "2026-03-02": 1}
        assert counted["scores"] == [0] * 9 + [1]

    def test_for_people(self, run: Run) -> None:
        text = run("results", "stats").stdout
        assert text.startswith("2 results, 2 files dropped\n")
        assert "0.9-1.0" in text
        assert text.endswith(f"{RESEARCH_USE_ONLY}\n")


class TestWithoutADatabase:
    @pytest.mark.parametrize("command", [["list", "--json"], ["show", "1"], ["stats"]])
    def test_it_says_what_to_do_and_creates_nothing(
        self, tmp_path: Path, command: list[str]
    ) -> None:
        home = tmp_path / "none"
        result = CliRunner().invoke(main, ["results", *command, "--home", str(home)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == (
            f"lungwatch: error: no database at {home}/lungwatch.db; run `lungwatch run` first\n"
        )
        assert not home.exists()

    def test_the_environment_names_the_home(self, home: Path) -> None:
        result = CliRunner().invoke(
            main, ["results", "list", "--json"], env={"LUNGWATCH_HOME": str(home)}
        )
        assert len(json.loads(result.stdout)) == 2

    def test_an_empty_database_is_no_error(self, tmp_path: Path) -> None:
        open_database(f"sqlite:///{tmp_path / 'lungwatch.db'}").dispose()
        result = CliRunner().invoke(main, ["results", "list", "--home", str(tmp_path)])
        assert (result.exit_code, result.stdout) == (0, "No results.\n")

    def test_a_newer_database_is_one_clear_line(self, run: Run, home: Path) -> None:
        engine = open_engine(f"sqlite:///{home / 'lungwatch.db'}")
        with writing(engine) as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        engine.dispose()
        result = run("results", "list")
        assert result.exit_code == 1
        assert "newer than this program" in result.stderr
        assert result.stderr.count("\n") == 1


class TestTheCommandItself:
    def test_help_lists_every_command_and_says_what_it_is(self) -> None:
        result = CliRunner().invoke(main, ["-h"])
        assert result.exit_code == 0
        assert RESEARCH_USE_ONLY in result.stdout
        assert all(f"\n  {name} " in result.stdout for name in COMMANDS)

    def test_version(self) -> None:
        result = CliRunner().invoke(main, ["--version"])
        assert __version__ in result.stdout
        assert RESEARCH_USE_ONLY in result.stdout

    def test_an_unknown_command_is_a_usage_error(self) -> None:
        assert CliRunner().invoke(main, ["frobnicate"]).exit_code == 2

    @pytest.mark.parametrize("arguments", [["--help"], ["results", "list", "--help"]])
    def test_help_imports_nothing_heavy(self, arguments: list[str]) -> None:
        program = (
            "import sys\n"
            "from lungwatch.cli.main import main\n"
            f"main({arguments!r}, standalone_mode=False)\n"
            "heavy = {'onnxruntime', 'tensorflow', 'keras', 'cv2', 'matplotlib', 'alembic'}\n"
            "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_closed_pipe_leaves_no_traceback(self, home: Path) -> None:
        """As in `lungwatch results list | head -0`."""
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", "from lungwatch.cli.main import main; main()"),
                *("results", "list", "--json", "--home", str(home)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        process.stderr.close()
        assert process.wait(timeout=240) == 128 + signal.SIGPIPE
        assert errors == ""


class TestModel:
    def test_the_shipped_bundles_are_listed_shown_and_verified(self, run: Run) -> None:
        listed = json.loads(run("model", "list", "--json").stdout)
        if not listed:
            pytest.skip("no model ships with this checkout")
        for entry in listed:
            assert entry["error"] is None
            assert entry["bundle"] == f"{entry['name']}-{entry['version']}"
            assert 0 < entry["threshold"] < 1
            assert entry["bundle"] in run("model", "list").stdout
            shown = run("model", "show", entry["bundle"])
            assert shown.exit_code == 0
            assert f"{entry['threshold']:.6g}" in shown.stdout
            verified = run("model", "verify", entry["bundle"])
            assert verified.exit_code == 0
            assert "digest, contract and golden image are right" in verified.stdout
        assert SHIPPED_DEFAULT in run("model", "verify").stdout

    def test_a_damaged_bundle_is_listed_with_its_fault_and_not_verified(
        self, run: Run, home: Path
    ) -> None:
        bundle = home / "models" / "mine-1"
        bundle.mkdir(parents=True)
        (bundle / "model.onnx").write_bytes(b"nothing")
        (bundle / "bundle.json").write_text(json.dumps({"sha256": {"model.onnx": "0" * 64}}))
        listed = json.loads(run("model", "list", "--json").stdout)
        (mine,) = [entry for entry in listed if entry["bundle"] == "mine-1"]
        assert "SHA-256 differs" in mine["error"]
        verified = run("model", "verify", "mine-1")
        assert verified.exit_code == 1
        assert verified.stderr.startswith("lungwatch: error: ")
        assert verified.stderr.count("\n") == 1

    def test_an_unknown_bundle_names_those_that_exist(self, run: Run) -> None:
        result = run("model", "show", "nope")
        assert result.exit_code == 1
        assert "no model bundle 'nope'; there are: " in result.stderr


class TestTimes:
    """Read with the machine seven hours east of Greenwich."""

    def test_a_date_is_the_whole_day(self) -> None:
        assert parse_since("2026-03-01") == datetime(2026, 2, 28, 17, tzinfo=UTC)
        assert parse_until("2026-03-01") == datetime(2026, 3, 1, 17, tzinfo=UTC)

    def test_a_time_is_the_machines_unless_it_has_a_zone(self) -> None:
        assert parse_until("2026-03-01T08:00") == datetime(2026, 3, 1, 1, tzinfo=UTC)
        assert parse_since("2026-03-01 08:00+00:00") == datetime(2026, 3, 1, 8, tzinfo=UTC)

    @pytest.mark.parametrize(
        ("text", "ago"),
        [
            ("90m", timedelta(minutes=90)),
            ("24h", timedelta(days=1)),
            ("7d", timedelta(days=7)),
            ("2w", timedelta(weeks=2)),
        ],
    )
    def test_so_long_ago(self, text: str, ago: timedelta) -> None:
        before = datetime.now(UTC)
        found = parse_since(text)
        assert before - ago <= found <= datetime.now(UTC) - ago


class TestOutput:
    @pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
    def test_what_a_spreadsheet_would_run_is_made_text(self, start: str) -> None:
        text = to_csv(["a"], [{"a": f"{start}1+1"}])
        assert next(csv.reader(io.StringIO(text.split("\n", 1)[1])))[0] == f"'{visible(start)}1+1"

    def test_numbers_stay_numbers(self) -> None:
        assert to_csv(["a", "b"], [{"a": -2.5, "b": None}]) == '"a","b"\n-2.5,""\n'

    def test_a_value_that_json_does_not_know_is_refused(self) -> None:
        with pytest.raises(TypeError, match="object has no JSON form"):
            to_json(object())
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json(float("nan"))

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "-"),
            ((), "-"),
            (True, "yes"),
            (0.12345, "0.123"),
            (("a", 0.5), "a, 0.500"),
            ("x\ny", "x\\ny"),
            (T0, "2026-03-01 19:00:00+07:00"),
        ],
    )
    def test_cells_are_for_people(self, value: object, text: str) -> None:
        assert cell_text(value) == text
