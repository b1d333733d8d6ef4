"""What every figure shares: colours, markers, panels, how NaN is said, and how a figure becomes small SVG."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec
from xml.etree import ElementTree

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text

from nsteer.errors import printable
from nsteer.science import axis

INK, FAINT = "#1b1b1d", "#8a8a8f"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
"""Okabe and Ito's palette, safe for colour-blind readers, without the yellow that white paper swallows."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MAP = "cividis"
"""The colour map of every heat map: its lightness rises all the way, so that it reads in grey."""

RC: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # where it stands anyhow; without a place each drawing looks for one among the ticks
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "white",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # a label with dollar signs is a label
    "svg.fonttype": "none",
    "svg.hashsalt": "nsteer",
}

P = ParamSpec("P")


def as_figure(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """The function under the style of this folder, in the words of its arrays; the reader's own settings stay."""

    @wraps(function)
    @axis.of_arrays
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(RC):
            return _printable(function(*args, **kwargs))

    return styled


def _printable(fig: Figure) -> Figure:
    """The figure, its labels spelled where they do not print: SVG holds no control character, no font draws one."""
    for text in fig.findobj(Text):
        if isinstance(text, Text) and not (said := text.get_text()).isprintable():
            text.set_text(printable(said))
    return fig


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line of the series with this index: told apart in grey too."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[(index + index // len(MARKERS)) % len(LINES)],
    }


# ---- subsets of labelled data -------------------------------------------------------------------------------


def along(data: Any, dim: str) -> Iterator[tuple[str, Any]]:
    """(label, subset) of every label of a dim; the whole, under its scalar label or "", where there is no such dim."""
    if dim in data.dims:
        for label in data[dim].values.tolist():
            yield str(label), data.sel({dim: label})
    else:
        yield (str(data[dim].values.item()) if dim in data.coords else ""), data


def labels(data: Any, dim: str) -> list[str]:
    """The labels of a dim as text."""
    return [str(label) for label in data[dim].values.tolist()]


def each_model(data: Any) -> list[tuple[str, Any]]:
    """(model, subset) of one Dataset, or of a list of them: models differ in layers, so they need not share a grid."""
    subsets: list[Any] = [data] if isinstance(data, xr.Dataset | xr.DataArray) else list(data)
    return [pair for subset in subsets for pair in along(subset, "model")]


def depth_of(data: Any) -> np.ndarray:
    """Relative depth of each layer: the coordinate `depth`, else layer / layers."""
    if "depth" in data.coords:
        return np.asarray(data.depth.values, float)
    return np.asarray(data.layer.values, float) / max(float(data.layer.max()) + 1, 1)


# ---- figures and panels --------------------------------------------------------------------------------------


def figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    return Figure(figsize=(width, height), layout=layout)


def panels(n: int, columns: int = 4, size: tuple[float, float] = (4, 3), layout: Any = None, **shared: Any) -> Any:
    """A figure and its n axes in rows of at most `columns`; without an automatic `layout`, `lay` places them."""
    across = min(n, columns)
    down = -(-n // columns)
    fig = figure(*size, layout)
    axes = fig.subplots(down, across, squeeze=False, **shared).ravel().tolist()
    for spare in axes[n:]:
        spare.set_axis_off()
    return fig, axes[:n]


def lay(
    fig: Figure,
    axes: Sequence[Axes],
    notes: Iterable[str],
    size: tuple[float, float],
    apart: tuple[float, float] = (0.15, 0.95),
    left: float = 0.75,
    top: float = 0.5,
    bottom: float = 0.6,
) -> None:
    """Places panels of a size (inches), a legend at their right and notes below; `apart`: between columns and rows.

    By hand, since the automatic layout takes longer than all the drawing.
    """
    grid = axes[0].get_gridspec()
    assert grid is not None, "panels come from `panels`"
    down, across = grid.get_geometry()
    names = key(fig, axes)
    right = 0.75 + 0.075 * longest(names) if names else 0.2
    width = left + across * size[0] + (across - 1) * apart[0] + right
    lines = wrapped(notes, width)
    bottom += 0.13 * len(lines) + 0.05
    height = top + down * size[1] + (down - 1) * apart[1] + bottom
    fig.set_size_inches(width, height)
    fig.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=apart[0] / size[0],
        hspace=apart[1] / size[1],
    )
    say(fig, lines)


def empty(why: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    fig = figure(6.4, 1.2)
    fig.text(0.5, 0.5, "\n".join(textwrap.wrap(why, 90)), ha="center", va="center", color=INK)
    return fig


def wrapped(notes: Iterable[str], width: float) -> list[str]:
    """Notes as lines that fit a figure of so many inches, each note once."""
    return [line for note in dict.fromkeys(notes) if note for line in textwrap.wrap(note, max(int(width * 15), 40))]


def say(fig: Figure, notes: Iterable[str]) -> None:
    """Notes under a figure, each once: n, what is missing, what is marked."""
    if lines := wrapped(notes, fig.get_figwidth()):
        fig.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color=INK)


def key(fig: Figure, axes: Sequence[Axes]) -> list[str]:
    """One legend for all panels, to their right; its names."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        fig.legend(list(handles.values()), list(handles), loc="upper right", handlelength=2.6)
    return list(handles)


def grid_lines(ax: Axes, axis: Any = "y") -> None:
    ax.grid(True, axis=axis, color=FAINT, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def heat(
    ax: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    show: Sequence[Sequence[str]] | None = None,
) -> Any:
    """A heat map with named rows (first on top) and columns; NaN are hatched; `show` writes text into cells."""
    ax.patch.set(facecolor="none", hatch="////", edgecolor=FAINT)
    edges = {"edgecolors": "white", "linewidth": 0.3} if max(values.shape) <= 40 else {"rasterized": True}
    mesh = ax.pcolormesh(np.ma.masked_invalid(values), cmap=MAP, vmin=low, vmax=high, **edges)
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), 0))  # first row on top, shared axes too
    rows, columns = (list(map(printable, names)) for names in (rows, columns))  # a tick makes its text as it is drawn
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90 if longest(columns) > 3 else 0)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    for at in np.ndindex(values.shape) if show is not None else ():
        text = show[at[0]][at[1]] if show is not None else ""
        if text:
            bright = (values[at] - low) / max(high - low, 1e-12) > 0.55
            ink = "black" if bright else "white"
            ax.text(at[1] + 0.5, at[0] + 0.5, text, ha="center", va="center", fontsize=6.5, color=ink, linespacing=0.95)
    return mesh


def longest(names: Sequence[str]) -> int:
    return max(map(len, names), default=0)


def bar(fig: Figure, mesh: Any, axes: Sequence[Axes], label: str) -> None:
    """The colour bar of heat maps that share a scale."""
    shown = fig.colorbar(mesh, ax=list(axes), label=label, shrink=0.85, aspect=25, pad=0.02)
    shown.outline.set_visible(False)


def edges_of(values: np.ndarray, floor: float = np.inf) -> tuple[float, float]:
    """Least and greatest of what is there, the least at most `floor`; 0 to 1 where nothing is."""
    known = values[~np.isnan(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = min(float(known.min()), floor), float(known.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def span(numbers: Iterable[float], word: str = "") -> str:
    """`n = 40`, or `n = 12 to 40`."""
    known = sorted({int(n) for n in numbers})
    if not known:
        return ""
    shown = str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
    return f"n = {shown}" + (f" {word}" if word else "")


# ---- SVG -----------------------------------------------------------------------------------------------------

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def svg(fig: Figure, title: str, description: str, prefix: str) -> str:
    """A figure as one `<svg>` element for a page: text stays text, ink follows the page's, no style attribute.

    A style attribute would be refused by a strict content security policy, so each becomes presentation attributes.
    Ids start with `prefix`, which makes them unique on a page.
    """
    buffer = io.StringIO()
    shown = fig.patch.get_visible()
    fig.patch.set_visible(False)
    with matplotlib.rc_context(RC):  # not savefig: it lays a figure out, draws it for nothing, then draws it
        FigureCanvasSVG(fig).print_svg(buffer, metadata={"Date": None})
    fig.patch.set_visible(shown)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop(root)
    for element in root.iter():
        _plain(element, prefix)
    used = {reference for e in root.iter() for v in e.attrib.values() for reference in re.findall(r"#([\w-]+)", v)}
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    wide = float(root.attrib["width"].removesuffix("pt"))
    for name, text in (("desc", description), ("title", title)):
        child = ElementTree.Element(name, id=f"{prefix}-{name}")
        child.text = printable(text)
        root.insert(0, child)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": f"{wide * 4 / 3:.0f}",
        "role": "img",
        "aria-labelledby": f"{prefix}-title {prefix}-desc",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _drop(root: ElementTree.Element) -> None:
    """Takes away what a page does not need: metadata and the style sheet."""
    for parent in list(root.iter()):
        for child in list(parent):
            name = child.tag.split("}")[-1]
            if name in ("metadata", "style"):
                parent.remove(child)


def _plain(element: ElementTree.Element, prefix: str) -> None:
    """Style into attributes, links short, ids prefixed, coordinates of two digits."""
    attributes = dict(element.attrib)
    for rule in attributes.pop("style", "").split(";"):
        name, _, value = (word.strip() for word in rule.partition(":"))
        if name == "font":
            size, _, _ = value.partition("px")
            attributes["font-size"] = size.split()[-1]
            if "bold" in value:
                attributes["font-weight"] = "bold"
        elif name and name != "font-family":
            attributes[name] = value
    if (link := attributes.pop(f"{{{_LINK}}}href", None)) is not None:
        attributes["href"] = link
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            value = f"{prefix}-{value}"
        value = value.replace("url(#", f"url(#{prefix}-")
        if name == "href" and value.startswith("#"):
            value = f"#{prefix}-{value[1:]}"
        if name != "href":
            value = _NUMBER.sub(lambda at: f"{float(at[0]):.2f}", value)
        element.set(name, value.replace(INK, "currentColor"))
