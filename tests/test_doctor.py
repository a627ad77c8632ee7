"""What is installed is named with its fix."""

import json

import pytest
from packaging.requirements import Requirement

from recbole_slifmr import doctor
from recbole_slifmr.cli import main
from recbole_slifmr.doctor import ABSENT, BROKEN, OK, check_folder, check_package, examine
from recbole_slifmr.host import compat


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    return stop.value.code


def test_where_nothing_is_broken_every_part_is_listed(capsys):
    assert run("--json") == 0
    checks = {(check["group"], check["name"]): check for check in json.loads(capsys.readouterr().out)}
    assert {name for group, name in checks if group == "repairs of RecBole"} == set(compat.REPAIRS)
    for name in ("recbole", "torch", "numpy", "pandas", "ray", "faiss-cpu", "python"):
        assert checks["packages", name]["state"] in (OK, ABSENT)
    for name in ("memory", "CPU"):
        assert checks["machine", name]["found"]
    assert checks["files of the package", "properties/model/SLIFMR.yaml"]["state"] == OK
    repair = checks["repairs of RecBole", "numpy_aliases"]["found"]
    assert repair.startswith(("repaired: Add the numpy names", "not needed: Add the numpy names"))


def test_what_is_broken_is_named_with_its_fix_and_status_1(capsys, monkeypatch):
    broken = [doctor.Check("packages", "pandas", BROKEN, "3.0 (<3,>=2.2)", "pip install 'pandas>=2.2,<3'")]
    monkeypatch.setattr(doctor, "_packages", lambda: iter(broken))
    assert run() == 1
    assert capsys.readouterr().err.strip() == "broken: pandas: 3.0 (<3,>=2.2): pip install 'pandas>=2.2,<3'"
    assert run("--json") == 1


def test_it_fits_a_screen_and_verbose_has_a_line_for_each_check(capsys):
    assert run() == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) <= 24 and "nothing is broken" in screen
    checks = examine()
    for group in ("packages", "repairs of RecBole", "folders", "files of the package"):
        states = [check.state for check in checks if check.group == group]
        assert f"{group}: {states.count(OK)} of {len(states)} ok" in screen
    for check in checks:
        assert check.state == OK or check.name in screen, "what is absent is shown"
    assert run("--verbose") == 0
    shown = capsys.readouterr().out
    assert [check.name for check in checks if check.name not in shown] == []


@pytest.mark.parametrize(
    "wanted, state, found, fix",
    [
        ("numpy>=1.26", OK, "(>=1.26)", ""),
        ("numpy<1", BROKEN, "(<1)", "pip install 'numpy<1'"),
        ("recbole==9", BROKEN, "(==9)", "pip install 'recbole==9'"),
        ("nosuchpackage>=2", BROKEN, "not installed", "pip install 'nosuchpackage>=2'"),
        ("nosuchpackage>=2; extra == 'ann'", ABSENT, "not installed", "pip install 'nosuchpackage>=2'"),
        ("scikit-learn>=1", OK, "(>=1)", ""),
        ("ray[tune]>=2; extra == 'x'", OK, "(>=2 for the extra x)", ""),
    ],
)
def test_packages_are_compared_with_what_is_asked_for(wanted, state, found, fix):
    check = check_package(Requirement(wanted))
    assert check.state == state and found in check.found and check.fix == fix


def test_a_package_that_does_not_import_is_broken(tmp_path, monkeypatch):
    (tmp_path / "crooked.py").write_text("raise OSError('libcrooked.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    check = check_package(Requirement("crooked; extra == 'ann'"))
    assert check.state == BROKEN and "OSError: libcrooked.so" in check.found


def test_a_repair_that_fails_is_broken(monkeypatch):
    def gone():
        """Mend what is gone."""
        raise AttributeError("no attribute 'dataset'")

    monkeypatch.setitem(compat.REPAIRS, "gone", gone)
    check = next(check for check in examine() if check.name == "gone")
    assert check.state == BROKEN and "no attribute 'dataset'" in check.found and "recbole==1.2.1" in check.fix


def test_folders_are_tried_and_not_made(tmp_path, monkeypatch):
    assert check_folder(tmp_path / "a" / "b").state == OK
    assert not (tmp_path / "a").exists() and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    check = check_folder(tmp_path / "file" / "b")
    assert check.state == BROKEN and "cannot be written" in check.found and "work in another folder" in check.fix


def test_missing_files_of_the_package_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor, "PROPERTIES", tmp_path / "properties")
    checks = list(doctor._own_files())
    assert checks and all(check.state == BROKEN and "install the package anew" in check.fix for check in checks)
