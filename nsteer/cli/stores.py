"""Commands that take stores: report, ls, verify, merge, gc, diff. Heavy imports happen inside commands."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import click

from nsteer.cli.base import AS_JSON, HOST, OUTSIDE, command, of_store, say, speak_of
from nsteer.errors import StoreError, printable

FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")
NUMERIC = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?%?", re.I)
"""What a spreadsheet takes for a formula; and a number, which may begin alike."""

STORE = click.argument("store")  # a directory or a URL: the store itself tells what it is not


@command
@STORE
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Also write FILE.html (a page with figures and texts) or FILE.csv (the claims table); repeatable.",
)
@click.option(
    "--claims", "wanted", is_flag=True, help="Also print the claims of Jeong 2026 beside what STORE measured."
)
@click.option("--claim", "asked", multiple=True, metavar="CLAIM", help="Only rows of this claim; repeatable.")
@click.option(
    "--verdict",
    "verdicts",
    multiple=True,
    type=click.Choice(["agrees", "differs", "inconclusive", "cannot"]),
    help="Only rows of the claims table with this verdict; repeatable. Files hold all rows.",
)
@AS_JSON
@of_store
def report(
    store: str,
    outputs: tuple[str, ...],
    wanted: bool,
    asked: tuple[str, ...],
    verdicts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print what STORE was made for, whether it worked and against which control, with doses, layers and texts.

    The claims of Jeong 2026 follow where the study is that paper's, or with --claims, --claim, --verdict, --json or a
    CSV; the table is then kept in the store. Loads no model.

    \b
    Example:
      nsteer report store/quickstart.zarr -o report.html
    """
    kinds = {output: _kind(output) for output in outputs}
    # before numpy is imported: with two threads its many small products took 1.4 s more of CPU and no less time
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from nsteer.report import overview, reporting
    from nsteer.store import results

    opened = results.open(store)
    speak_of(opened.axis)
    evidence = reporting.evidence(opened)
    rows = bool(asked or verdicts or as_json or ".csv" in kinds.values())
    claim_rows = None
    if wanted or rows or overview.of_the_paper(evidence):
        claim_rows = reporting.report(opened, evidence)
        if why := claim_rows.attrs.pop("not_kept", ""):
            say(f"note: the table is not kept in the store: {why}", err=True, lines=False)
    table = None if claim_rows is None else reporting.table(claim_rows)
    chosen = bool(asked or verdicts or as_json)
    first = None if chosen and ".html" not in kinds.values() else overview.overview_of(evidence, opened.name)
    for output, kind in kinds.items():
        if kind == ".csv":
            _csv(table, output)
        else:
            from nsteer.report import page

            assert first is not None
            page.write(output, evidence, claim_rows, first, evidence.ratings[0] or None)
    if first is not None and not chosen:
        from nsteer.report.overview.printing import print_overview

        print_overview(first, claim_rows is not None)
    if table is not None:
        _claims(table, claim_rows, asked, verdicts, as_json)
    for output in outputs:
        say(f"wrote {output}", err=True)


def _claims(table: Any, claim_rows: Any, asked: tuple[str, ...], verdicts: tuple[str, ...], as_json: bool) -> None:
    """Prints the claims table, or the rows of it that were asked for."""
    from nsteer.report import terminal

    if asked and not table.claim.isin(asked).any():
        raise StoreError(f"no claim {', '.join(asked)}; there are {', '.join(dict.fromkeys(table.claim))}")
    if asked:
        table = table[table.claim.isin(asked)]
    if verdicts:
        table = table[table.verdict.str.split().str[0].isin(verdicts)]
    whole = bool(asked or verdicts)
    say(table.to_json(orient="records")) if as_json else terminal.print_claims(table, claim_rows, whole)


def _csv(table: Any, output: str) -> None:
    from nsteer.system.files import aside

    try:
        with aside(output) as temporary:
            table.map(_cell).to_csv(temporary, index=False)
    except OSError as error:
        raise StoreError(f"can not write {output}: {error.strerror or error}; name another file with -o") from error


def _cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula: a text that would be one gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if FORMULA.match(text) and not NUMERIC.fullmatch(text) else text


def _kind(output: str) -> str:
    """The ending of a file to write, before anything is computed for it."""
    kind = Path(output).suffix.lower()
    if kind not in (".csv", ".html"):
        raise click.BadParameter(f"{output}: expected a name that ends in .html or .csv", param_hint="-o")
    if not Path(output).parent.is_dir():
        raise StoreError(f"can not write {output}: no such folder; make it, or name another file with -o")
    return kind


@command
@STORE
@AS_JSON
@of_store
def ls(store: str, as_json: bool) -> None:
    """List what is in STORE: groups, dims, cells done.

    \b
    Example:
      nsteer ls store/quickstart.zarr
    """
    from nsteer.report import terminal
    from nsteer.store import results

    opened = results.open(store)
    say(json.dumps(terminal.store_data(opened))) if as_json else terminal.print_store(opened)


@command
@STORE
@click.option(
    "--repair", is_flag=True, help="Drop the records of broken cells, so that the next run computes them again."
)
@AS_JSON
@of_store
def verify(store: str, repair: bool, as_json: bool) -> None:
    """Read every file of STORE and name what is missing, damaged or contradictory. Exit code 1 if anything is.

    \b
    Example:
      nsteer verify store/quickstart.zarr --repair
    """
    from nsteer.report import terminal
    from nsteer.store import Store
    from nsteer.upkeep import printing
    from nsteer.upkeep.repair import repair as mend
    from nsteer.upkeep.verify import verify as look

    with terminal.counting("cells read") as told:
        report = mend(Store(store), told) if repair else look(Store(store), told)
    say(json.dumps(printing.report_data(report))) if as_json else printing.print_report(report)
    if not report.clean:
        sys.exit(1)


@command
@click.argument("stores", nargs=-1, required=True)
@click.option(
    "-o", "--output", required=True, metavar="OUT", help="The store to merge into: a new one, or one that exists."
)
@click.option("--prefer", type=click.Choice(["first", "last"]), help="Which store's cell is taken where cells differ.")
@AS_JSON
@of_store
def merge(stores: tuple[str, ...], output: str, prefer: Literal["first", "last"] | None, as_json: bool) -> None:
    """Merge STORES, from several machines, into one. Cells on which they differ are left out and named (exit code 1).

    \b
    Example:
      nsteer merge a.zarr b.zarr -o store/all.zarr
    """
    from nsteer.store import Store
    from nsteer.upkeep import printing
    from nsteer.upkeep.merge import merge as bring_together

    merged = bring_together([Store(store) for store in stores], Store(output), prefer)
    say(json.dumps(printing.merged_data(merged))) if as_json else printing.print_merged(merged, output)
    if merged.conflicts:
        sys.exit(1)


@command
@STORE
@click.argument("plans", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--delete", is_flag=True, help="Delete it; otherwise it is only listed.")
@click.option(
    "--older-than", default=60.0, metavar="MINUTES", help="Age from which leftover files may be deleted.  [60]"
)
@click.option(
    "--alone",
    is_flag=True,
    help="Confirm that no other machine writes to STORE: needed for --delete on object storage.",
)
@OUTSIDE
@HOST
@AS_JSON
@of_store
def gc(
    store: str,
    plans: tuple[str, ...],
    delete: bool,
    older_than: float,
    alone: bool,
    allow_outside: bool,
    host: str | None,
    as_json: bool,
) -> None:
    """List what of STORE no PLAN needs any more, and how large it is. Deletes nothing without --delete.

    \b
    Example:
      nsteer gc store/study.zarr plans/study.yaml plans/follow-up.yaml --delete
    """
    from nsteer.plan import check

    studies = [check.load(plan, allow_outside=allow_outside, host=host) for plan in plans]
    from nsteer.report import terminal
    from nsteer.store import Store
    from nsteer.upkeep import gc as collecting
    from nsteer.upkeep import printing
    from nsteer.upkeep.collect import collect, guarded

    opened = Store(store)
    if delete:
        guarded(opened, alone)
    gc_plan = collecting.plan(opened, studies, older_than * 60)
    if delete:
        with terminal.counting("cells and files removed", len(gc_plan.cells) + len(gc_plan.leftovers)) as told:
            collect(opened, gc_plan, told, alone=alone)
    say(json.dumps(printing.gc_data(gc_plan))) if as_json else printing.print_gc(store, gc_plan)


@command
@click.argument("a")
@click.argument("b", required=False)
@click.option("--runs", nargs=2, type=int, metavar="M N", help="Compare two runs of one store, by their numbers.")
@AS_JSON
@of_store
def diff(a: str, b: str | None, runs: tuple[int, int] | None, as_json: bool) -> None:
    """Compare store A with store B, cell by cell under the same labels. Exit code 0: equal, 1: they differ, 2: trouble.

    \b
    Example:
      nsteer diff here.zarr there.zarr
    """
    from nsteer.errors import StoreError
    from nsteer.store import Store
    from nsteer.upkeep import diff as comparing
    from nsteer.upkeep import printing

    if (b is None) == (runs is None):
        raise click.UsageError("give two stores, or one store and --runs M N")
    try:
        difference = comparing.stores(Store(a), Store(b)) if b else comparing.runs(Store(a), *runs or (0, 0))
    except StoreError as error:
        say(f"error: {error}", err=True)
        sys.exit(2)
    say(json.dumps(printing.diff_data(difference))) if as_json else printing.print_diff(difference)
    if not difference.equal:
        sys.exit(1)
