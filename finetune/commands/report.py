"""`ft report`: a page for a run, one in which several lie over each other, or the index of a folder of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.errors import UserError
from finetune.places import check_file
from finetune.report import page
from finetune.run import records
from finetune.run.records import Record
from finetune.run.writing import write_atomically
from finetune.terminal.progress import note, shown_path

KEY = "--output"


def run(names: Sequence[str], output: str | None = None) -> None:
    places = [Path(name).expanduser() for name in names]
    target = None if output is None else Path(output).expanduser()
    if len(places) == 1 and places[0].is_dir() and not records.is_run(places[0]):
        write_index(places[0], target)
        return
    found = [records.read(place) for place in places]
    if twice := next((r for r in found if [x.path.resolve() for x in found].count(r.path.resolve()) > 1), None):
        raise UserError("is given twice", path=twice.path, fix="name it once")
    if len(found) == 1:
        target = target or found[0].path / "report.html"
        check_file(target, KEY, lambda path: path.parent == found[0].path or page.is_report(path))
        text = page.of_one(found[0])
    else:
        target = target or Path("report.html")
        check_file(target, KEY, page.is_report)
        text = page.of_several(found)
    write_atomically(target, text)
    note(f"written to {shown_path(target)} ({len(text.encode()) / 1e6:.2f} MB)")


def write_index(folder: Path, target: Path | None) -> None:
    """index.html, and report.html of the runs that have none or an older one."""
    found = list(records.below(folder))
    if not found:
        raise UserError("no run is in it or below it", path=folder, fix="name a run directory, or a folder of some")
    target = target or folder / "index.html"
    check_file(target, KEY, page.is_report)
    made = sum(map(refreshed, found))
    write_atomically(target, page.index(folder, found, target.resolve().parent))
    note(f"written to {shown_path(target)}: {len(found)} runs, {made} reports made anew")


def refreshed(record: Record) -> bool:
    """Whether report.html was missing or older than what it tells, and is written now."""
    target = record.path / "report.html"
    told = [path for path in (record.run.evaluation, record.run.result, record.run.metrics) if path.is_file()]
    if target.is_file() and all(path.stat().st_mtime <= target.stat().st_mtime for path in told):
        return False
    try:
        page.write(record.path)
    except OSError as error:
        note(f"no report in {shown_path(record.path)}: {error.strerror}")
        return False
    return True
