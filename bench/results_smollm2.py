"""The page of real results, from the store of `plans/smollm2.yaml`: docs/results-smollm2.md and its figures.

    nsteer run plans/smollm2.yaml && python bench/results_smollm2.py [store/smollm2.zarr [store/further.zarr]]

Every number, and every verdict that rests on one, is computed here; nothing is written into the page by hand. The
second store holds captures alone, of whatever further models a machine has: where it is not named, the page has none.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import nsteer  # noqa: E402
from nsteer.report import figures  # noqa: E402
from nsteer.report.figures import style  # noqa: E402
from nsteer.science import separation, statistics  # noqa: E402
from nsteer.stages import sizing  # noqa: E402

DOCS = HERE.parent / "docs"

WORDS = {
    "happy": "happy happi glad joy delight smil cheer laugh excit wonderful proud love fun celebrat pleased thrill",
    "sad": "sad sorry grie mourn tear cry cries cried lonel alone loss lost miss sorrow heartbr memor tired",
    "afraid": "afraid fear scar terrif terror fright panic dread trembl nervous anxious anxiety danger dark shak worr",
    "angry": "angr anger furious fury rage annoy frustrat outrag hate hatred shout yell resent mad",
}
"""Emotion -> how words of it begin. Listed by hand, after eight texts of a smaller run had been seen."""

SHOWN = 10
"""Steered texts on the page."""


def count(text: str, emotion: str) -> int:
    """Words of an emotion in a text."""
    stems = tuple(WORDS[emotion].split())
    return sum(word.startswith(stems) for word in re.findall(r"[a-z']+", text.lower()))


def curves(results: Any, model: str) -> xr.Dataset:
    """Every measure of separation of all methods, by layer."""
    told = results["methods"].protocol
    protocols = {method: json.loads(told.sel({"method": method}).item()) for method in told.method.values}
    return separation.measure(
        results["activations", model].pooled.sel({"model": model}).load(),
        baseline={method: protocol["baseline"] for method, protocol in protocols.items()},
        text=results["samples", model].text.sel({"model": model}).load(),
        splits=10,
        shuffles=200,
    )


def best(measured: xr.Dataset, method: str, metric: str) -> tuple[int, float]:
    """The layer where a metric of a method is best, and its value there; cosine is best where it is least."""
    curve = measured[metric].sel({"method": method})
    at = curve.argmin("layer") if metric == "mean_pairwise_cosine" else curve.argmax("layer")
    return int(curve.layer[at]), float(curve[at])


def separation_table(measured: xr.Dataset, depth: int) -> list[str]:
    """A row a method: where it separates best, by accuracy and by the paper's metric."""
    rows = [
        "| method | texts | held-out accuracy, best | 95 % interval | p (any layer) | lowest cosine | accuracy there |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in measured.method.values.tolist():
        layer, share = best(measured, method, "accuracy")
        here = measured.sel({"method": method, "layer": layer})
        n = int(here.n_samples)
        low, high = interval(round(share * n), n)
        p = float(measured.accuracy_p_any.sel({"method": method}))
        lowest = "none: pinned at -1/19 by algebra"
        there = ""
        if not bool(here.pinned):
            other, cosine = best(measured, method, "mean_pairwise_cosine")
            lowest = f"{cosine:.2f} at {other} (depth {other / depth:.2f})"
            there = f"{float(measured.accuracy.sel({'method': method, 'layer': other})):.2f}"
        rows.append(
            f"| `{method}` | {n} | {share:.2f} at {layer} (depth {layer / depth:.2f}) | {low:.2f} to {high:.2f} "
            f"| {p:.2g} | {lowest} | {there} |"
        )
    return rows


def interval(k: int, n: int) -> tuple[float, float]:
    bounds = statistics.wilson(k, n)
    return bounds.low, bounds.high


def grid(results: Any) -> tuple[xr.DataArray, xr.DataArray, xr.Dataset, xr.DataArray]:
    """Steered texts, their twins, scores and perplexity ratios, over (emotion, strength, control, prompt)."""
    indices = dict(model=0, op=0, layer_set=0, method=0, seed=0)
    steered = results["generations"].text.isel(indices).load()
    continuations = results["unsteered"].text.isel(model=0, op=0, seed=0).load()
    score = xr.Dataset({"more": xr.zeros_like(steered, dtype=float)})
    for place in np.ndindex(steered.shape):
        at = dict(zip(steered.dims, place, strict=True))
        text = steered.isel(at)
        emotion, unsteered = str(text.emotion.item()), str(continuations.sel({"prompt": text.prompt.item()}).item())
        score.more[at] = count(str(text.item()), emotion) > count(unsteered, emotion)
    ratio = results["outcomes"].perplexity.isel(indices) / results["outcomes_unsteered"].perplexity.isel(
        model=0, op=0, seed=0
    )
    return steered, continuations, score, ratio.load()


def steering_table(score: xr.Dataset, ratio: xr.DataArray) -> list[str]:
    """A row a strength: success of the vector and of both controls, the difference and its p."""
    rows = [
        "| KL | control | share | 95 % interval | p against the vector | perplexity ratio (median) |",
        "|---|---|---|---|---|---|",
    ]
    for kl in score.strength.values.tolist():
        vector = score.more.sel({"strength": kl, "control": "none"}).values.ravel()
        for control in score.control.values.tolist():
            hits = score.more.sel({"strength": kl, "control": control}).values.ravel()
            low, high = interval(int(hits.sum()), hits.size)
            p = "" if control == "none" else f"{statistics.paired_permutation(vector, hits).p:.2g}"
            times = float(np.nanmedian(ratio.sel({"strength": kl, "control": control})))
            name = "the vector" if control == "none" else control
            rows.append(
                f"| {kl:g} | {name} | {hits.mean():.2f} ({int(hits.sum())} of {hits.size}) "
                f"| {low:.2f} to {high:.2f} | {p} | {times:.1f} |"
            )
    means = {c: score.more.sel({"control": c}).mean("strength").values.ravel() for c in score.control.values.tolist()}
    for control, values in means.items():
        bounds = statistics.mean_interval(values)
        p = "" if control == "none" else f"{statistics.paired_permutation(means['none'], values).p:.2g}"
        rows.append(
            f"| all | {'the vector' if control == 'none' else control} | {values.mean():.2f} (n = {values.size}) "
            f"| {bounds.low:.2f} to {bounds.high:.2f} | {p} | |"
        )
    return rows


@style.as_figure
def dose(score: xr.Dataset) -> Any:
    """Share of continuations with more words of the emotion, by KL, with Wilson intervals; the controls beside it."""
    figure, (ax,) = style.panels(1)
    strengths = score.strength.values.tolist()
    for i, control in enumerate(score.control.values.tolist()):
        hits = score.more.sel({"control": control})
        shares = [float(hits.sel({"strength": kl}).mean()) for kl in strengths]
        n = hits.sel({"strength": strengths[0]}).size
        bounds = [interval(round(share * n), n) for share in shares]
        name = "the vector" if control == "none" else control
        ax.plot(strengths, shares, label=name, **style.look(i))
        ax.fill_between(strengths, *zip(*bounds, strict=True), color=style.look(i)["color"], alpha=0.13, linewidth=0)
    ax.set(
        xscale="log",
        xlabel="KL from the unsteered model (nats a token)",
        ylabel="more words of the emotion",
        ylim=(0, 1),
    )
    ax.set_title(f"n = {n} continuations a point")
    style.grid_lines(ax)
    style.lay(figure, [ax], [], (3.4, 2.2))
    return figure


def agreement(holds: bool) -> str:
    return "Agrees" if holds else "Does not agree"


def verdicts(measured: xr.Dataset, score: xr.Dataset, depth: int) -> list[str]:
    """What agrees with the paper, and what does not, as the numbers say."""
    own = measured.accuracy.sel({"method": "sound"})
    layer, share = best(measured, "sound", "accuracy")
    said = [
        f"- **{agreement(0.4 <= layer / depth <= 0.7)}: emotions are told apart best in the middle.** By held-out",
        f"  accuracy of the sound vectors: {share:.2f} at depth {layer / depth:.2f},",
        f"  {float(own[0]):.2f} at the first layer, {float(own[-1]):.2f} at the last.",
    ]
    papers = [m for m in ("jeong-generation", "jeong-comprehension") if m in measured.method.values]
    for method in papers:
        low, cosine = best(measured, method, "mean_pairwise_cosine")
        top, largest = best(measured, method, "accuracy")
        there = float(measured.accuracy.sel({"method": method, "layer": low}))
        said += [
            f"- **{agreement(abs(low - top) <= 0.1 * depth)}: the layer of lowest cosine is the one to read**",
            f"  (`{method}`). Lowest cosine {cosine:.2f} at layer {low} (depth {low / depth:.2f}),",
            f"  accuracy there {there:.2f}; best accuracy {largest:.2f} at layer {top} (depth {top / depth:.2f});",
            "  chance 0.05.",
        ]
    if len(papers) == 2:
        cosines = [best(measured, m, "mean_pairwise_cosine")[1] for m in papers]
        hits = [best(measured, m, "accuracy")[1] for m in papers]
        said += [
            f"- **By the paper's metric the better method is `{papers[int(np.argmin(cosines))]}`, by held-out accuracy",
            f"  `{papers[int(np.argmax(hits))]}`**: lowest cosines {' and '.join(f'{v:.2f}' for v in cosines)},",
            f"  best accuracies {' and '.join(f'{v:.2f}' for v in hits)} (generation, comprehension).",
        ]
    return said + steered_better(score) + steered_over_all(score)


def steered_better(score: xr.Dataset) -> list[str]:
    """Where the vector does better than every control, by the words of the texts."""
    strengths = []
    for kl in score.strength.values.tolist():
        more = score.more.sel({"strength": kl})
        vector = more.sel({"control": "none"}).values.ravel()
        others = {c: more.sel({"control": c}).values.ravel() for c in more.control.values.tolist() if c != "none"}
        p = {c: statistics.paired_permutation(vector, values).p for c, values in others.items()}
        if all(vector.mean() > values.mean() for values in others.values()) and max(p.values()) < 0.05:
            strengths.append(f"{kl:g} ({', '.join(f'p {value:.2g} against {c}' for c, value in p.items())})")
    if not strengths:
        return ["- **Steering beats both controls at no single strength here**, by the words that the texts use."]
    return [
        f"- **Steering beats every control of equal push at KL {', '.join(strengths)}**,",
        "  by the words that the texts use.",
    ]


def steered_over_all(score: xr.Dataset) -> list[str]:
    """The same over all strengths: a prompt and an emotion are one observation."""
    means = {c: score.more.sel({"control": c}).mean("strength").values.ravel() for c in score.control.values.tolist()}
    tests = {c: statistics.paired_permutation(means["none"], m).p for c, m in means.items() if c != "none"}
    better = all(means["none"].mean() > means[c].mean() for c in tests) and max(tests.values()) < 0.05
    shares = ", ".join(f"{m.mean():.2f} {'vector' if c == 'none' else c}" for c, m in means.items())
    told = ", ".join(f"p {p:.2g} against {c}" for c, p in tests.items())
    return [
        f"- **Over all strengths together it {'does' if better else 'does not'} beat every control**: {shares}",
        f"  ({told}; n = {means['none'].size}).",
    ]


def texts(steered: xr.DataArray, continuations: xr.DataArray) -> list[str]:
    """Texts at the middle strength: prompts and emotions in turn, chosen by their place and nothing else."""
    middle = steered.strength.values.tolist()[len(steered.strength) // 2]
    emotions, names = steered.emotion.values.tolist(), steered.prompt.values.tolist()
    rows = ["| prompt | emotion | steered | unsteered |", "|---|---|---|---|"]
    for i in range(SHOWN):
        prompt, emotion = names[i % len(names)], emotions[(i + i // len(names)) % len(emotions)]
        text = steered.sel({"prompt": prompt, "emotion": emotion, "strength": middle, "control": "none"}).item()
        rows.append(f"| {prompt} | {emotion} | {cell(text)} | {cell(continuations.sel({'prompt': prompt}).item())} |")
    return [f"At KL {middle:g}; prompts and emotions in turn, none left out.", "", *rows]


def cell(text: object) -> str:
    return re.sub(r"\s+", " ", str(text)).strip().replace("|", "\\|").replace("<", "&lt;")


PAGE = """# SmolLM2-135M: what nsteer finds in a real model

Made by `python bench/results_smollm2.py` from the store of `plans/smollm2.yaml`: no number in a table was typed. The
model is SmolLM2-135M-Instruct ({weights}), a chat model of {parameters:.0f}M
parameters in {depth} blocks of width {width}, in float32 on a CPU; torch {torch}, transformers {transformers}, nnsight
{nnsight}. It was run once: intervals are over texts, not over runs or models. {ran}

```bash skip="fetches a model and runs for minutes"
scripts/get-smollm2 && nsteer run plans/smollm2.yaml
```

## Where emotions are told apart

Held-out accuracy: which of 20 emotions a text is of, by the nearest vector, the vectors made without the texts of its
number; chance is 0.05. Cosine: the mean over pairs of emotion vectors, the paper's metric, where lower is called
better. `jeong-…` are the paper's two protocols, `sound` reads twelve passages an emotion whole, against their mean.

![Held-out accuracy over depth](figures/smollm2-accuracy.svg)

{separation}

The layer of the best accuracy was chosen by that accuracy: its interval does not know of it, `p (any layer)` does (the
best layer against the best layers of 200 sets of shuffled labels).

![Mean pairwise cosine over depth](figures/smollm2-cosine.svg)

## Steering at equal push

The sound vectors of {emotions} are added at layers {layers}, {prompts} prompts each, at strengths that were
searched until the next-token distribution moved by the KL (nats a token) that the row names; every control was
searched for the same KL. A continuation counts when it has more words of the emotion than the unsteered one: lists of
word beginnings in the script, made by hand after eight texts of a smaller run had been seen. No judge read these texts.

![Dose and response](figures/smollm2-dose.svg)

{steering}

p: paired permutation over continuations, which share prompts and emotions; not corrected for the three strengths. `all`
takes the mean over strengths of each prompt and emotion, with a t interval; it was added once the rows above it had
been seen.

## What agrees with the paper, and what does not

One model of 135M parameters in a 4-bit file; Jeong 2026 has nine, up to 8B.

{verdicts}

{further}## Ten texts

{texts}
"""

EARLIER = """
It is a run of an earlier version: by their fingerprints {done} of its {cells} cells are as today's makes them. Its
`random` control drew a direction for every layer by itself, where today's turns the vectors of all layers by one
rotation, and its neutral passages were others. With today's passages the extraction alone was run again: `sound` has
accuracy 0.52 at layer 17, `jeong-comprehension` 0.27 at layer 16 and its lowest cosine, 0.57, at layer 2.
"""

FURTHER = """## Further models

The same passages, read by {models}: `jeong-comprehension` and `sound`, no steering. No script
fetches their files; any GGUF file goes the same way:

```bash skip="needs files that no script fetches"
nsteer run plans/smollm2-small.yaml --set 'steer=[]' --set measure.capability=false --set store=store/further.zarr \\
  --set 'models=[{{id: models/a-file-of-yours.gguf, label: its-name}}]'
```

![Held-out accuracy over depth, by model](figures/further-accuracy.svg)

![Mean pairwise cosine over depth, by model](figures/further-cosine.svg)

{table}

Perplexity is that of an English paragraph, with BOS and without, looked at when the model was loaded.

"""


def ran(results: Any, store: str) -> str:
    """How long the run took, and whether its cells are those of today."""
    runs = results["runs"]
    spans = zip(runs.started.values.tolist(), runs.finished.values.tolist(), strict=True)
    took = [(datetime.fromisoformat(end) - datetime.fromisoformat(start)).seconds for start, end in spans if end]
    size = sizing.size(nsteer.load(HERE.parent / "plans/smollm2.yaml", [f"store={store}"], allow_outside=True))
    done, cells = size.total("done"), size.total("cells")
    told = f"That took {sum(took) / 60:.0f} minutes of wall time."
    if done == cells:
        return f"{told} All of its {cells} cells are as this version makes them."
    return told + EARLIER.format(done=done, cells=cells).rstrip()


def further_table(results: Any, measured: list[xr.Dataset]) -> list[str]:
    """A row a model and method: where it separates best by accuracy and by the paper's metric, and how it reads."""
    rows = [
        "| model | method | texts | held-out accuracy, best | 95 % interval | lowest cosine | accuracy there | "
        "perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measures in measured:
        known = results["models"].sel({"model": measures.model.item()})
        seen = json.loads(known.health.item())
        pair = (seen["perplexity_with_bos"], seen["perplexity_without_bos"])
        read = ", ".join("no BOS" if value is None else f"{value:.0f}" for value in dict.fromkeys(pair))
        for row in separation_table(measures, int(known.n_layers))[2:]:
            method, texts, share, bounds, _, lowest, there = row.removeprefix("| ").removesuffix(" |").split(" | ")
            cells = (
                f"{measures.model.item()}, {known.weights.item()}",
                method,
                texts,
                share,
                bounds,
                lowest,
                there,
                read,
            )
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def page(results: Any, model: str, measured: xr.Dataset, store: str, further: str) -> str:
    known = results["models"].sel({"model": model})
    depth = int(known.n_layers)
    steered, continuations, score, ratio = grid(results)
    return PAGE.format(
        weights=known.weights.item(),
        parameters=int(known.parameters) / 1e6,
        depth=depth,
        width=int(known.d_model),
        **json.loads(known.versions.item()),
        separation="\n".join(separation_table(measured, depth)),
        emotions=", ".join(steered.emotion.values.tolist()),
        layers=", ".join(results["generations"].layer_set.values.tolist()),
        prompts=len(steered.prompt),
        steering="\n".join(steering_table(score, ratio)),
        verdicts="\n".join(verdicts(measured, score, depth)),
        texts="\n".join(texts(steered, continuations)),
        ran=ran(results, store),
        further=further,
    )


def main() -> None:
    store, *more = sys.argv[1:] or ["store/smollm2.zarr"]
    results = nsteer.open(store)
    model = str(results["models"].model.values[0])
    measured = curves(results, model)
    pictures = {
        "smollm2-accuracy": figures.layer_curves(measured, "accuracy"),
        "smollm2-cosine": figures.layer_curves(measured, "mean_pairwise_cosine"),
        "smollm2-dose": dose(grid(results)[2]),
    }
    further = ""
    for other in map(nsteer.open, more):
        others = [curves(other, name).assign_coords(model=name) for name in other.models]
        pictures["further-accuracy"] = figures.layer_curves(others, "accuracy")
        pictures["further-cosine"] = figures.layer_curves(others, "mean_pairwise_cosine")
        further = FURTHER.format(models=" and ".join(other.models), table="\n".join(further_table(other, others)))
    (DOCS / "figures").mkdir(exist_ok=True)
    for name, figure in pictures.items():
        with matplotlib.rc_context(style.RC):
            figure.savefig(DOCS / "figures" / f"{name}.svg", metadata={"Date": None})
    (DOCS / "results-smollm2.md").write_text(page(results, model, measured, store, further), encoding="utf-8")


if __name__ == "__main__":
    main()
