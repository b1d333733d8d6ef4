"""Turns what `shown` tells of a store into tables on a terminal; ASCII tables, without colour, when piped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console

from nsteer.errors import printable
from nsteer.report.shown import METRICS, word_diff
from nsteer.report.terminal import console, rich_text, table
from nsteer.science.axis import current

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
STYLES = {" ": "", "-": "red strike", "+": "bold green"}
TITLES = {"accuracy": "held-out accuracy", "mean_pairwise_cosine": "mean pairwise cosine", "reliability": "reliability"}


def print_view(shown: dict[str, Any], code: bool = False) -> None:
    """Everything that `shown.view` tells; with `code`, the programs that the store keeps instead."""
    out = console()
    if code:
        for program in shown["programs"]:
            head = printable(f"# ---- program {program['program']}: {program['stage']} ----", lines=False)
            out.print(f"{head}\n\n{program['source']}", soft_wrap=True)
        return
    out.print(printable(f"{shown['store']}: {', '.join(shown['models'])}", lines=False))
    if shown["separation"]:
        print_separation(out, shown["separation"])
    if shown["contrasts"]:
        print_kept(out, shown["contrasts"])
    if shown["dose"]:
        print_dose(out, shown["dose"])
    for text in shown["texts"]:
        print_text(out, text)
    if not any(shown[name] for name in ("separation", "contrasts", "dose", "texts")):
        out.print("no activations and no steered texts in this store; `nsteer ls` lists what it holds")


# ---- tables ---------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float | None], ascii_only: bool) -> str:
    """Values as a line of bars from their least to their greatest, a blank for a missing value."""
    bars = ASCII_BARS if ascii_only else BARS
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, reach = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if v is None else bars[round((v - low) / reach * (len(bars) - 1))] for v in values)


def print_separation(out: Console, rows: Iterable[dict[str, Any]]) -> None:
    """Each metric over the layers as a sparkline with its range, and its best layer."""
    grid = table("model", "method", "texts", *(TITLES[metric] for metric in METRICS))
    for column in grid.columns:
        column.justify = "left"
    for row in rows:
        shown = [_curve(row[metric], row["best"][metric], not out.is_terminal) for metric in METRICS]
        grid.add_row(*map(str, (row["model"], row["method"], row["n_samples"], *shown)))
    out.print("\nseparation, first layer to last; best layer after @ (none: pinned by algebra, or nothing there)")
    out.print(grid)


def _curve(values: Sequence[float | None], best: dict[str, Any] | None, ascii_only: bool) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    place = f"{best['value']:.2f} @ {best['layer']}" if best else "none"
    return f"{sparkline(values, ascii_only)} {min(known):.2f} to {max(known):.2f}, {place}"


def print_kept(out: Console, rows: Iterable[dict[str, Any]]) -> None:
    """Of how many answers that the model wrote each contrast is a mean."""
    grid = table("model", "contrast", "side", "written", "kept", "judge")
    for row in rows:
        grid.add_row(*(str(row[name]) for name in ("model", "direction", "side", "written", "kept", "judge")))
    out.print("\nanswers that contrasts are means of")
    out.print(grid)


def print_dose(out: Console, rows: Sequence[dict[str, Any]]) -> None:
    """A table for each setup: emotion by strength, how many moved to the target, at random in brackets."""
    for where, group in groupby(rows, key=lambda row: [row[d] for d in ("model", "op", "layer_set", "method")]):
        own = list(group)
        strengths = sorted({row["strength"] for row in own})
        grid = table(current(), *[f"{s:g}" for s in strengths])
        at = {(row["emotion"], row["control"], row["strength"]): row for row in own}
        for emotion in dict.fromkeys(row["emotion"] for row in own):
            shown = [_dose(at.get((emotion, "none", s)), at.get((emotion, "random", s))) for s in strengths]
            grid.add_row(str(emotion), *map(str, shown))
        judged = any(row["judged"] for row in own)
        what = "moved to the target" if judged else "continuations"
        out.print("\n" + printable(f"{' / '.join(filter(None, where))}: {what}, by strength", lines=False))
        out.print(grid)
    out.print("[random direction]; r, e: repetitive, explosive continuations")


def _dose(own: dict[str, Any] | None, random: dict[str, Any] | None) -> str:
    if own is None:
        return "-"
    text = f"{own['moved']}/{own['judged']}" if own["judged"] else str(own["n"])
    if random is not None and random["judged"]:
        text += f" [{random['moved']}/{random['judged']}]"
    marks = [f"{own[name]}{name[0]}" for name in ("repetitive", "explosive") if own[name]]
    return " ".join([text, *marks])


# ---- texts ----------------------------------------------------------------------------------------------------


def print_text(out: Console, row: dict[str, Any]) -> None:
    """A steered text as changes of its unsteered continuation: in colour, or as [-gone-] and {+come+} when piped."""
    names = [row[d] for d in ("model", "op", "method", "emotion") if row[d]]
    names += [f"strength {row['strength']:g}"] if row["strength"] is not None else []
    names += [f"control {row['control']}"] if row["control"] not in ("none", "") else []
    out.print()
    out.print(rich_text(" / ".join([*names, row["prompt"]]), "bold", lines=False))
    judged = f"judge: {row['named']}" + (f" (unsteered: {row['unsteered_named']})" if row["unsteered_named"] else "")
    said = [judged] if row["named"] else []
    said += [row["regime"] or "regime undetermined"]
    said += [
        f"{name.replace('_', ' ')} {row[name]:.3g}"
        for name in ("repetition", "perplexity_ratio")
        if row[name] is not None
    ]
    out.print(rich_text("; ".join(said), "dim", lines=False))
    shown = rich_text(row["prompt_text"], "dim")
    if row["unsteered"] is None:
        shown.append(printable(row["text"]) + "\n(no unsteered continuation)", style="not dim")
    else:
        for kind, words in word_diff(row["unsteered"], row["text"]):
            shown.append(_marked(kind, printable(words), not out.is_terminal), style=f"not dim {STYLES[kind]}")
    out.print(shown, soft_wrap=not out.is_terminal)


def _marked(kind: str, words: str, ascii_only: bool) -> str:
    if not ascii_only or kind == " ":
        return words
    left = len(words) - len(words.lstrip())
    opening, closing = ("[-", "-]") if kind == "-" else ("{+", "+}")
    return f"{words[:left]}{opening}{words[left:]}{closing}"
