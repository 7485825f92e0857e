"""The licences of what `ft` needs, and whether a known hole is in one of them.

    python tools/audit.py             both: writes docs/licences.md, asks the database of advisories (network)
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
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "ft-recipes"
PAGE = Path(__file__).parent.parent / "docs" / "licences.md"
UNREACHED = 3
HEAD = """# Licences of the dependencies

Written by `python tools/audit.py --licences` (`make audit` writes it, too) from what packages say of themselves: what
ft needs by itself, and all that this needs in turn; extras apart. Versions are those installed.

| package | version | licence | needed by |
|---|---|---|---|
"""


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


def page() -> str:
    rows = []
    for name, by in sorted(everything().items()):
        who = ", ".join(sorted(by)[:3]) + (f", {len(by) - 3} more" if len(by) > 3 else "")
        rows.append(f"| {name} | {metadata.version(name)} | {licence_of(name).replace('|', '/')} | {who} |")
    return HEAD + "\n".join(rows) + "\n"


def ask(program: str | None) -> int:
    """Run pip-audit over this environment."""
    if program is None:
        print("pip-audit is not installed here: pip install pip-audit, or --pip-audit PATH", file=sys.stderr)
        return UNREACHED
    listed = "".join(f"{name}=={metadata.version(name)}\n" for name in sorted(everything()))
    command = [
        program,
        "--no-deps",
        "--disable-pip",
        "--progress-spinner",
        "off",
        "--format",
        "json",
        "-r",
        "/dev/stdin",
    ]
    done = subprocess.run(command, input=re.sub(r"\+\w+", "", listed), text=True, capture_output=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"the database of advisories could not be asked: {reason}", file=sys.stderr)
        return UNREACHED
    for package in packages:
        for hole in package.get("vulns", []):
            print(f"{package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions'])}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]  # pip-audit itself ends with 0
    holes = sum(len(package.get("vulns", [])) for package in packages)
    print(f"{len(packages) - len(skipped)} packages asked for, {holes} holes known, {len(skipped)} not asked for")
    if skipped:
        print(f"the index here knows nothing of {', '.join(skipped[:5])}{' …' * (len(skipped) > 5)}", file=sys.stderr)
    return 1 if holes else UNREACHED if skipped else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--licences", action="store_true", help="only the licences")
    parser.add_argument("--pip-audit", default=shutil.which("pip-audit"), help="the program, where it is elsewhere")
    given = parser.parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0 if given.licences else ask(given.pip_audit)


if __name__ == "__main__":
    sys.exit(main())
