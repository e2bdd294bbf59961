"""The harness' own judgement, without a machine: what it runs, and when it says that all is well."""

import subprocess
import sys

import pytest

from tests.softroce import SoftRoceError, __main__, debian, image, machine, marked

PASSED = '<testcase classname="m" name="t"><properties>{}</properties></testcase>'
MOVED = '<property name="lane_bytes" value="7"/>'
ENDED = '<testcase classname="m" name="u"><{}/></testcase>'
MARK = "mark." + "verbs"
"""In two parts, so that this file is not taken for one that uses the mark."""


def report(tmp_path, *cases: str) -> marked.Report:
    path = tmp_path / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return marked.read_report(path)


def test_lane_bytes_are_added_up(tmp_path):
    good = report(tmp_path, PASSED.format(MOVED), PASSED.format(MOVED), PASSED.format(""))
    assert good == marked.Report(run=3, failed=(), skipped=(), lane_bytes=14)
    good.check()


@pytest.mark.parametrize(
    ("cases", "reason"),
    [
        ([], "no marked test was run"),
        ([PASSED.format("")], "was anything moved"),
        ([PASSED.format(MOVED), ENDED.format("skipped")], "skipped.*m.u"),
        ([PASSED.format(MOVED), ENDED.format("failure")], "failed: m.u"),
        ([PASSED.format(MOVED), ENDED.format("error")], "failed: m.u"),
    ],
)
def test_a_run_that_proves_nothing_fails(tmp_path, cases, reason):
    with pytest.raises(SoftRoceError, match=reason):
        report(tmp_path, *cases).check()


def test_pytest_writes_the_report_that_is_read(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_moves(record_property): record_property('lane_bytes', 5)\n"
        "@pytest.mark.skip\n"
        "def test_skips(): pass\n"
        "def test_fails(): assert False\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", f"--rootdir={tmp_path}"]
    command += [
        "-p",
        "no:cacheprovider",
        *marked.REPORT_OPTIONS,
        "--junitxml=report.xml",
        "test_it.py",
    ]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert marked.read_report(tmp_path / "report.xml") == marked.Report(
        run=2, failed=("test_it.test_fails",), skipped=("test_it.test_skips",), lane_bytes=5
    )


def test_only_files_with_the_mark_are_run(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "test_a.py").write_text(f"pytestmark = pytest.{MARK}")
    (tmp_path / "test_b.py").write_text(f'pytest.param("verbs", marks=pytest.{MARK})')
    (tmp_path / "test_c.py").write_text("pytest.mark.verbose")
    (tmp_path / "conftest.py").write_text(f"pytest.{MARK}")
    found = marked.marked_files(tmp_path)
    assert [path.name for path in found] == ["test_a.py", "test_b.py"]


def test_nothing_is_installed_without_consent(monkeypatch, capsys):
    monkeypatch.setattr(debian, "require_debian", lambda: None)
    monkeypatch.setattr(debian, "missing_packages", lambda: ["kmod", "perftest"])
    monkeypatch.setattr(debian, "kernel_package", lambda: "linux-image-1-amd64")
    monkeypatch.setattr(image, "cached", lambda _: None)
    monkeypatch.setattr(debian, "update_lists", lambda: pytest.fail("went on"))
    assert __main__.main(["prepare"]) == 1
    said = capsys.readouterr()
    assert "kmod, perftest" in said.out
    assert "linux-image-1-amd64" in said.out
    assert "YES=1" in said.err


@pytest.mark.parametrize(
    ("os_release", "user", "reason"),
    [("ID=fedora\n", 0, "not Debian"), ("ID=debian\n", 1000, "root is needed")],
)
def test_a_machine_that_will_not_do_is_told_why(monkeypatch, tmp_path, os_release, user, reason):
    path = tmp_path / "os-release"
    path.write_text(os_release)
    monkeypatch.setattr(debian, "OS_RELEASE", path)
    monkeypatch.setattr("os.geteuid", lambda: user)
    with pytest.raises(SoftRoceError, match=reason):
        debian.require_debian()


def test_without_an_image_a_run_says_how_to_make_one(monkeypatch, tmp_path):
    monkeypatch.setattr(image, "cache_folder", lambda: tmp_path)
    with pytest.raises(SoftRoceError, match="softroce prepare"):
        machine.run(["true"])
    with pytest.raises(ValueError, match="two nodes"):
        machine.run(["true"], netem="delay 1ms")
