"""`make audit` writes what it was told into docs/licences.md: holes, none, or that nobody could be asked."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402

NAMES = sorted(audit.everything())
FAKE = """#!{python}
import json, sys

if "--version" in sys.argv:
    raise SystemExit(print("pip-audit 9.8.7"))
service = sys.argv[sys.argv.index("-s") + 1]
packages = [dict(zip(("name", "version"), line.split("=="))) for line in sys.stdin.read().split()]
for package in packages:
    package["vulns"] = []
holed = packages.pop()
assert (holed["name"], holed["version"]) == {holed}
holed["vulns"] = [{{"id": "PYSEC-0", "fix_versions": []}}]
{then}
print(json.dumps({{"dependencies": [*packages, holed]}}))
"""
HOLE = """
packages[0]["vulns"] = [{"id": "PYSEC-1", "aliases": ["CVE-2"], "fix_versions": ["7.1", "8.0"]}]
packages[1]["vulns"] = [{"id": "PYSEC-3", "aliases": [], "fix_versions": []}]
"""
UNKNOWN = """
for package in packages[THESE]:
    del package["vulns"]
    package["skip_reason"] = "not found on https://secret.example/simple"
"""
BROKEN = """
print("Traceback", file=sys.stderr)
raise SystemExit("requests.exceptions.ConnectionError: HTTPSConnectionPool(host='secret.example') at /home/me/x")
"""


def written(
    monkeypatch: pytest.MonkeyPatch, folder: Path, then: str | None, *flags: str, page: str = "page.md"
) -> tuple[int, str]:
    """(exit code, the page), where pip-audit does what `then` says."""
    if then is not None:
        program = folder / "pip-audit"
        program.write_text(FAKE.format(python=sys.executable, holed=audit.HOLED, then=then))
        program.chmod(0o755)
        flags = (*flags, "--pip-audit", str(program))
    monkeypatch.setattr(audit, "PAGE", folder / page)
    monkeypatch.setattr(audit.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["audit.py", *flags])
    code = audit.main()
    text = (folder / page).read_text(encoding="utf-8")
    assert text.count("\n| ") >= len(NAMES)
    assert text.count(audit.HOLES) == 1
    assert "secret.example" not in text
    assert "/home" not in text
    assert str(folder) not in text
    return code, text


def told(text: str) -> str:
    today = datetime.now(UTC).date().isoformat()
    return text.partition(audit.HOLES)[2].replace(today, "TODAY").replace(f"{len(NAMES)} packages", "ALL packages")


def test_holes_are_named_with_what_mends_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, text = written(monkeypatch, tmp_path, HOLE)
    assert code == 1
    assert "Asked on TODAY (ft " in told(text)
    assert ", pip-audit 9.8.7, service pypi): ALL packages asked, 2 vulnerabilities known." in told(text)
    versions = [audit.metadata.version(name) for name in NAMES[:2]]
    assert f"| {NAMES[0]} | {versions[0]} | PYSEC-1, CVE-2 | 7.1, 8.0 |" in text
    assert f"| {NAMES[1]} | {versions[1]} | PYSEC-3 | none yet |" in text


def test_none_is_said_when_all_were_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, text = written(monkeypatch, tmp_path, "")
    assert code == 0
    assert told(text).endswith("ALL packages asked, 0 vulnerabilities known.\n")


@pytest.mark.parametrize(
    ("then", "why"),
    [
        (BROKEN, "pypi: no answer (ConnectionError); osv: no answer (ConnectionError)"),
        (UNKNOWN.replace("THESE", ":"), "the index that answered has no advisories of them"),
        ("holed['vulns'] = []", "the index that answered has no advisories of them"),
        ("packages = []", "the index that answered has no advisories of them"),
        ("raise SystemExit(4)", "pypi: no answer (exit 4)"),
        (None, "pip-audit is not installed here"),
    ],
)
def test_where_nobody_could_be_asked_it_does_not_say_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, then: str | None, why: str
) -> None:
    code, text = written(monkeypatch, tmp_path, then)
    assert code == 3
    assert told(text).startswith("Could not be asked on TODAY (ft ")
    assert why in told(text)
    assert "vulnerabilities known" not in text


def test_packages_that_nobody_was_asked_about_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, text = written(monkeypatch, tmp_path, UNKNOWN.replace("THESE", "-2:"))
    assert code == 3
    assert f"{len(NAMES) - 2} packages asked, 0 vulnerabilities known." in told(text)
    assert f"**Not asked**, so not known: {NAMES[-2]}, {NAMES[-1]} (" in told(text)


def test_another_service_is_asked_about_what_the_first_does_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what the first said of the others stays."""
    first = HOLE + UNKNOWN.replace("THESE", "2:")
    then = "if service == 'pypi':" + first.replace("\n", "\n    ") + "\nassert service == 'pypi' or len(packages) > 2\n"
    code, text = written(monkeypatch, tmp_path, then)
    assert code == 1
    assert "service pypi, osv): ALL packages asked, 2 vulnerabilities known." in told(text)
    assert "Not asked" not in text
    code, text = written(monkeypatch, tmp_path, "if service == 'pypi':" + BROKEN.replace("\n", "\n    "))
    assert code == 0
    assert "service osv): ALL packages asked, 0 vulnerabilities known." in told(text)


def test_licences_alone_keep_the_answer_about_the_same_versions_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, asked = written(monkeypatch, tmp_path, HOLE)
    assert written(monkeypatch, tmp_path, None, "--licences") == (0, asked)
    monkeypatch.setattr(audit.metadata, "version", lambda name: "99")
    _, text = written(monkeypatch, tmp_path, None, "--licences")
    assert "Nobody has been asked of these versions" in text
    assert "PYSEC-1" not in text


def test_the_page_here_was_written_by_this_command() -> None:
    """And says when, or that nobody was asked."""
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    assert text.startswith(audit.HEAD)
    said = text.partition(audit.HOLES)[2]
    assert said.startswith(("Asked on 20", "Could not be asked on 20", "Nobody has been asked"))
