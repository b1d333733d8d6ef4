"""Turns what a store says of its vectors into the card of a repository, for readers who have no store."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsteer import __version__
from nsteer.science import axis, separation
from nsteer.store.results import Results

SHOWN = ("source", "preset", "template", "samples", "neutral_samples", "pooling", "baseline", "estimator", "chat")
"""Knobs of a protocol that the card shows in its table; the whole of it is in the files."""


def card(opened: Results, title: str, configs: Mapping[str, Mapping[str, Any]], files: Sequence[str]) -> str:
    """The card in Markdown. configs : name -> model, method, emotions, layers, d_model, variants, revision, protocol;
    files : the safetensors."""
    head = {
        "tags": ["nsteer", "steering-vectors", "activation-steering"],
        "configs": [
            {
                "config_name": name,
                "data_files": [
                    {"split": variant, "path": f"data/{name}/{variant}.parquet"} for variant in config["variants"]
                ],
            }
            for name, config in configs.items()
        ],
    }
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())
    first = next(iter(configs))
    sections = [
        f"---\n{front}\n---",
        f"# {_text(title)}",
        "Steering vectors of language models, made by nsteer "
        f"{__version__} from the store `{_text(opened.name)}`. A vector is a direction in the residual stream.",
        "## Which layer is which",
        "Layers count blocks from 0 (`block-index`): layer N is the residual stream **after** block N (`resid_post`), "
        "`hidden_states[N + 1]` of transformers. The column `layers` names the rows of `vector`.",
        "## Vectors",
        _table(
            ("config", "model", "revision", "dtype", "method", "emotions", "layers", "d_model"),
            [
                (
                    f"`{name}`",
                    config["model"]["id"],
                    config["model"]["revision"][:12],
                    config["model"]["dtype"],
                    config["method"],
                    ", ".join(config["emotions"]),
                    len(config["layers"]),
                    config["d_model"],
                )
                for name, config in configs.items()
            ],
        ),
        "Variants (splits): "
        + "; ".join(
            f"`{variant}` {MEANT[variant]}"
            for variant in dict.fromkeys(v for c in configs.values() for v in c["variants"])
        )
        + ".",
        "## Protocols",
        _table(("config", *SHOWN), [(f"`{n}`", *_shown(config["protocol"])) for n, config in configs.items()]),
        "## Noise ceiling",
        "How well the geometry of the emotions can be known from so many samples: the reliability of the matrix of "
        "cosine dissimilarities, by split halves and Spearman-Brown. No correlation with it can be expected to "
        "be higher than its square root.",
        _table(
            ("config", "layer", "reliability"),
            [(f"`{name}`", *ceiling(opened, config)) for name, config in configs.items()],
        ),
        "## Receipts",
        "What edits with these vectors did to the stream when the store's grid was steered: means over cells, prompts, "
        "seeds and steered layers.",
        receipts(opened) or "The store has no steering.",
        "## Use",
        "```bash\n"
        f"nsteer import hub:OWNER/NAME --into theirs.zarr\n```\n\n"
        "```python\nfrom datasets import load_dataset\n\n"
        f'rows = load_dataset("OWNER/NAME", "{first}", split="{configs[first]["variants"][0]}")\n```',
        "## Files",
        "\n".join(
            f"- `{file}`: a tensor `method/emotion` [layers, d_model] a vector; metadata `nsteer`" for file in files
        )
        + "\n- `data/`: the same as tables, a row an emotion\n- `plan.yaml`: the plan of the store's last run, "
        "if it has one\n- `nsteer.json`: what is in here, with SHA-256",
    ]
    return "\n\n".join(sections) + "\n"


MEANT = {
    "raw": "as the method left them",
    "unit": "of length 1 at every layer",
    "reference_norm": "as long as the mean norm of the neutral samples' streams",
}
"""Variant -> what its vectors are."""


def ceiling(opened: Results, config: Mapping[str, Any]) -> tuple[str, str]:
    """The middle layer, and the reliability of a method's geometry there; where it can not be determined, why."""
    model, method, protocol = config["model"]["label"], config["method"], config["protocol"]
    layer = config["layers"][len(config["layers"]) // 2]
    if not protocol or not any(path.startswith("activations/") for path in opened):
        return str(layer), "no samples in the store"
    try:
        pooled = axis.inward(opened["activations", model]).pooled.sel({"method": [method], "layer": [layer]}).load()
    except LookupError:
        return str(layer), "no samples in the store"
    if pooled.sizes["emotion"] < 4:
        return str(layer), "too few emotions"
    denoised = protocol.get("project_out") or {}
    matrices = separation.rdms(pooled, baseline=protocol["baseline"], variance=denoised.get("variance"))
    value = float(matrices.reliability.squeeze())
    return str(layer), f"{value:.2f}" if math.isfinite(value) else "too few samples"


def receipts(opened: Results) -> str:
    """A table of what the store's steering did, by block, strength and control; "" where there is none."""
    if "steering" not in opened:
        return ""
    data = opened["steering"].load()
    rows = []
    for op in data.op.values.tolist():
        for strength in data.strength.values.tolist():
            for control in data.control.values.tolist():
                here = data.sel({"op": op, "strength": strength, "control": control})
                said = [_mean(here[name].values) for name in ("relative_change", "cosine")]
                if said[0]:
                    rows.append((op, f"{strength:g}", control, *said))
    return _table(("block", "strength", "control", "‖Δ‖/‖h‖", "cosine of before and after"), rows) if rows else ""


def _mean(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known.mean():.3g}" if known.size else ""


def _shown(protocol: Mapping[str, Any]) -> list[str]:
    values = [protocol.get(name) for name in SHOWN]
    return ["" if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _text(value: Any) -> str:
    """A text of a plan as one line of Markdown in which it is no markup of a table, a link or HTML."""
    line = " ".join(str(value).split())[:200]
    return line.replace("|", "\\|").replace("<", "&lt;").replace("](", "] (")
