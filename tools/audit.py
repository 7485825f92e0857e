"""The licences of what `ft` needs, and whether a known hole is in one of them; both are written into docs/licences.md.

    python tools/audit.py             both; asks the database of advisories (network)
    python tools/audit.py --licences  only the licences, from what is installed here

Exit code: 0 nothing known, 1 a hole is known, 3 the database could not be asked, or not of every package.
pip-audit is run as it is installed
(pip install pip-audit, also in an environment of its own: `--pip-audit PATH`).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "ft-recipes"
PAGE = Path(__file__).parent.parent / "docs" / "licences.md"
UNREACHED = 3
SERVICES = ("pypi", "osv")
HOLED = ("django", "1.8")
"""Has dozens of known holes: an index that names none of them (a mirror without advisories) knows of none at all."""
HEAD = """# Licences of the dependencies

Written by `make audit` (without a network: `python tools/audit.py --licences`) from what packages say of themselves:
what ft needs by itself, and all that this needs in turn; extras apart. Versions are those installed.

| package | version | licence | needed by |
|---|---|---|---|
"""
HOLES = "\n## Known vulnerabilities\n\n"
NOT_YET = f"{HOLES}Nobody has been asked of these versions: `make audit` asks.\n"


@dataclass
class Answer:
    """What a service said: of how many packages, which holes; and why it said nothing of the others."""

    service: str
    asked: int = 0
    others: list[str] = field(default_factory=list)
    holes: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Package, version, names of the hole, versions in which it is mended."""
    reason: str = ""


def needs(name: str) -> list[str]:
    """What a package requires here, without extras."""
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement.name)
    return found


def everything() -> dict[str, set[str]]:
    """Installed package -> who needs it, from ft down."""
    found: dict[str, set[str]] = {}
    waiting = [(name, "ft") for name in needs(PACKAGE)]
    while waiting:
        name, by = waiting.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system
        if name not in found:
            waiting += [(other, name) for other in needs(name)]
        found.setdefault(name, set()).add(by)
    return found


def licence_of(name: str) -> str:
    """The SPDX expression, what the classifiers say, or the first line of the licence."""
    about: Any = metadata.metadata(name)
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    said = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    said = [line for line in said if line != "OSI Approved"]
    return ", ".join(said) or next(iter(str(about.get("License") or "").strip().splitlines()), "") or "not said"


def licences() -> str:
    rows = []
    for name, by in sorted(everything().items()):
        who = ", ".join(sorted(by)[:3]) + (f", {len(by) - 3} more" if len(by) > 3 else "")
        rows.append(f"| {name} | {metadata.version(name)} | {licence_of(name).replace('|', '/')} | {who} |")
    return HEAD + "\n".join(rows) + "\n"


def ask(program: str, service: str, names: list[str]) -> Answer:
    """Run pip-audit over packages of this environment."""
    listed = {name: re.sub(r"\+\w+", "", metadata.version(name)) for name in names}
    words = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "-r", "/dev/stdin"]
    lines = "".join(f"{name}=={version}\n" for name, version in [*listed.items(), HOLED])
    done = subprocess.run([program, "-s", service, *words], input=lines, text=True, capture_output=True)
    found = Answer(service)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        print(f"{service}: {said}", file=sys.stderr)
        kind = re.match(r"[\w.]*?(\w+(Error|Exception|Timeout))\b", said)  # the rest may name hosts and folders
        return Answer(service, 0, names, reason=f"no answer ({kind[1] if kind else f'exit {done.returncode}'})")
    known = {package["name"]: package for package in packages if "skip_reason" not in package}  # pip-audit ends with 0
    if not known.pop(HOLED[0], {"vulns": []})["vulns"]:
        known = {}
    found.others = [name for name in names if name not in known]
    found.asked = len(names) - len(found.others)
    found.reason = "the index that answered has no advisories of them" if found.others else ""
    for name, package in known.items():
        for hole in package["vulns"]:
            called, mended = ", ".join([hole["id"], *hole.get("aliases", [])]), ", ".join(hole["fix_versions"])
            found.holes.append((name, package["version"], called, mended or "none yet"))
    return found


def answers_of(program: str | None) -> list[Answer]:
    """Each service is asked about what those before it did not know."""
    names, found = sorted(everything()), list[Answer]()
    if program is None:
        reason = "pip-audit is not installed here: pip install pip-audit, or --pip-audit PATH"
        return [Answer("nobody", 0, names, reason=reason)]
    for service in SERVICES:
        found.append(ask(program, service, names))
        names = found[-1].others
        if not names:
            break
    return found


def section(answers: list[Answer], program: str | None) -> str:
    """Never "none" of a package that nobody was asked about."""
    asked, others, when = sum(answer.asked for answer in answers), answers[-1].others, datetime.now(UTC).date()
    holes = sorted(hole for answer in answers for hole in answer.holes)
    ran = subprocess.run([program, "--version"], text=True, capture_output=True).stdout if program else ""
    version = re.fullmatch(r"pip-audit [\w.]+", ran.strip())  # nothing else goes into the page
    about = f"ft {metadata.version(PACKAGE)}, {version[0] if version else 'pip-audit'}"
    why = "; ".join(f"{answer.service}: {answer.reason}" for answer in answers if answer.reason)
    if not asked:
        text = f"Could not be asked on {when} ({about}), for none of the {len(others)} packages:\n{why}.\n"
        return f"{HOLES}{text}Whether there are any is not known.\n"
    services = ", ".join(answer.service for answer in answers if answer.asked)
    text = f"{HOLES}Asked on {when} ({about}, service {services}): "
    text += f"{asked} packages asked, {len(holes)} vulnerabilities known.\n"
    if others:
        text += f"\n**Not asked**, so not known: {', '.join(others)} ({why}).\n"
    if holes:
        rows = "".join(f"| {' | '.join(hole)} |\n" for hole in holes)
        text += f"\n| package | version | vulnerability | mended in |\n|---|---|---|---|\n{rows}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--licences", action="store_true", help="only the licences")
    parser.add_argument("--pip-audit", default=shutil.which("pip-audit"), help="the program, where it is elsewhere")
    given = parser.parse_args()
    table, code = licences(), 0
    if given.licences:  # an answer about other versions is none about these
        before, _, old = PAGE.read_text(encoding="utf-8").partition(HOLES) if PAGE.exists() else ("", "", "")
        holes = HOLES + old if old and before == table else NOT_YET
    else:
        answers = answers_of(given.pip_audit)
        holes = section(answers, given.pip_audit)
        code = 1 if any(answer.holes for answer in answers) else UNREACHED if answers[-1].others else 0
        print(holes.strip())
    PAGE.write_text(table + holes, encoding="utf-8")
    print(f"wrote {PAGE}")
    return code


if __name__ == "__main__":
    sys.exit(main())
