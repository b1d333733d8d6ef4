"""Embedded models -> a table of what they can and cannot do, by transformers and torch hooks alone.

    python bench/zoo_quality.py [family ...] [--prompts N] [--json FILE]

Nothing of nsteer but the corpus, the models and the text set is used, so this is an independent check of what
nsteer measures on them. Weights are the shipped float16 ones, computed in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import zoo_corpus as corpus
from scipy.stats import rankdata, spearmanr
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from nsteer import zoo

HERE = Path(__file__).parent
REQUIRED = {"told": 0.80, "neutral_bias": 1 / 21 + 0.15, "kin_auc": 0.90, "steered": 0.60, "random": 0.15}
ONE_LAYER = (0.35, 0.5, 0.7, 1.0)  # strengths, in mean stream norms, added at one layer
ALL_LAYERS = (0.03, 0.05, 0.1, 0.15)  # the same added at every layer


class Model:
    """A family's model and tokenizer, with reads and edits at block outputs."""

    def __init__(self, name: str):
        folder = zoo.path(name)
        self.words = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.blocks = self.net.transformer.h if name == "gpt2" else self.net.model.layers

    def chat(self, instruction: str) -> str:
        """The prompt text of one user turn."""
        return self.words.apply_chat_template(
            [{"role": "user", "content": instruction}], tokenize=False, add_generation_prompt=True
        )

    @torch.no_grad()
    def generate(self, texts: list[str], special: bool, new: int = 90, seed: int | None = None):
        """(ids [row, position], mask, length of the prompts); sampled at temperature 1 if a seed is given."""
        batch = self.words(texts, return_tensors="pt", padding=True, add_special_tokens=special)
        how = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed or 0)
        self.mask = batch["attention_mask"]
        ids = self.net.generate(**batch, max_new_tokens=new, **how)
        start = batch["input_ids"].shape[1]
        tail = self._alive(ids[:, start:])
        return ids, torch.cat([batch["attention_mask"], tail], 1), start

    def _alive(self, tail: torch.Tensor) -> torch.Tensor:
        """1 for story tokens, 0 from the first end of turn on."""
        ends = self.net.generation_config.eos_token_id
        ended = torch.isin(tail, torch.tensor(ends if isinstance(ends, list) else [ends]))
        return (ended.cumsum(1) == 0).long()

    def told(self, ids, mask, start) -> list[str]:
        """The generated texts."""
        return [
            self.words.decode(row[start:][keep[start:].bool()], skip_special_tokens=True).strip()
            for row, keep in zip(ids, mask, strict=True)
        ]

    @torch.no_grad()
    def streams(self, ids, mask) -> torch.Tensor:
        """Block outputs, [layer, row, position, d_model]."""
        out = []
        hooks = [
            b.register_forward_hook(lambda _m, _i, o: out.append(o[0] if isinstance(o, tuple) else o))
            for b in self.blocks
        ]
        position = (mask.cumsum(1) - 1).clamp(min=0)
        self.net(input_ids=ids, attention_mask=mask, position_ids=position)
        for hook in hooks:
            hook.remove()
        return torch.stack(out)

    @contextlib.contextmanager
    def steered(self, directions: torch.Tensor, strength: float, layers: list[int]):
        """h += strength · mean‖h‖ · unit(v) at the layers, one direction a row; pads do not count."""
        unit = directions / directions.norm(dim=-1, keepdim=True)

        def add(_module, _inputs, out):
            h = out[0] if isinstance(out, tuple) else out
            keep = self.mask if h.shape[1] > 1 else torch.ones(h.shape[0], 1)
            size = (h.norm(dim=-1) * keep).sum(1) / keep.sum(1)
            new = h + strength * size[:, None, None] * unit[:, None, :]
            return (new, *out[1:]) if isinstance(out, tuple) else new

        hooks = [self.blocks[layer].register_forward_hook(add) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Judge:
    """The shipped classifier."""

    def __init__(self):
        self.words = AutoTokenizer.from_pretrained(zoo.path("judge"))
        self.net = AutoModelForSequenceClassification.from_pretrained(zoo.path("judge"), dtype=torch.float32).eval()
        self.labels = [self.net.config.id2label[i] for i in range(self.net.config.num_labels)]

    @torch.no_grad()
    def __call__(self, texts: list[str], neutral: bool = False) -> list[str]:
        """A label for each text: one of the 20 emotions, or of 21 with neutral."""
        batch = self.words(texts, return_tensors="pt", padding=True, truncation=True)
        logits = self.net(**batch).logits
        if not neutral:
            logits[:, self.labels.index(corpus.NEUTRAL)] = -torch.inf
        return [self.labels[i] for i in logits.argmax(-1).tolist()]


def instructions(emotion: str, count: int) -> list[str]:
    """Instructions for one emotion: the templates in turn, each with its own place."""
    source = corpus.NEUTRAL_INSTRUCTIONS if emotion == corpus.NEUTRAL else corpus.INSTRUCTIONS
    texts = []
    for k in range(count):
        place = corpus.TABLES["places"][k % 12]
        asked = source[k % len(source)][0] + (corpus.TOPIC.format(topic=place) if k >= len(source) else "") + " ."
        texts.append(asked.replace("{emotion}", emotion))
    return texts


def share(hits) -> float:
    """Mean of a list of booleans, to three digits."""
    return round(float(np.mean(list(hits))), 3)


def auc(similarity: np.ndarray) -> float:
    """P(a kin pair is more similar than a pair that is not kin), from [20, 20]."""
    rows, columns = np.triu_indices(20, 1)
    kin = corpus.kin_pairs()
    positive = np.array([(corpus.EMOTIONS[i], corpus.EMOTIONS[j]) in kin for i, j in zip(rows, columns, strict=True)])
    ranks, n = rankdata(similarity[rows, columns]), positive.sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum()))


def geometry(vectors: np.ndarray) -> dict:
    """Kin AUC and Spearman with the planted similarity at every layer, from [layer, emotion, d_model]."""
    upper = np.triu_indices(20, 1)
    planted, aucs, rhos = corpus.planted_similarity()[upper], [], []
    for layer in vectors:
        unit = layer / np.linalg.norm(layer, axis=-1, keepdims=True)
        similarity = unit @ unit.T
        aucs.append(round(auc(similarity), 3))
        rhos.append(round(float(spearmanr(similarity[upper], planted).statistic), 3))
    return {"kin_auc": aucs, "spearman": rhos}


def pooled(streams: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """[layer, row, d_model]: the mean of the stream over positions, weighted."""
    w = weights.float() / weights.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("lrpd,rp->lrd", streams, w).numpy()


def middle(keep: torch.Tensor) -> torch.Tensor:
    """One position a row: the middle of the kept ones."""
    at = keep.argmax(1) + keep.sum(1) // 2
    return torch.nn.functional.one_hot(at.clamp(max=keep.shape[1] - 1), keep.shape[1])


def centred(samples: np.ndarray, labels: np.ndarray, neutral: bool = False) -> np.ndarray:
    """Emotion means minus the grand mean (or the neutral mean), [layer, 20, d_model]."""
    means = np.stack([samples[:, labels == e].mean(1) for e in corpus.EMOTIONS], 1)
    base = samples[:, labels == corpus.NEUTRAL].mean(1)[:, None] if neutral else means.mean(1, keepdims=True)
    return means - base


def stories(model: Model, seed: int | None, count: int = 10) -> dict:
    """Instructed stories of all emotions and neutral: texts, labels, pooled streams."""
    labels = np.array([e for e in (*corpus.EMOTIONS, corpus.NEUTRAL) for _ in range(count)])
    asked = [model.chat(i) for e in (*corpus.EMOTIONS, corpus.NEUTRAL) for i in instructions(e, count)]
    ids, mask, start = model.generate(asked, special=False, seed=seed)
    streams, keep = model.streams(ids, mask), mask.clone()
    keep[:, :start] = 0
    return {
        "texts": model.told(ids, mask, start),
        "labels": labels,
        "mean": pooled(streams, keep),
        "middle": pooled(streams, middle(keep)),
    }


def read(model: Model, texts: dict) -> dict:
    """Comprehension: streams of the held-out passages, last token and mean."""
    rows = [(p, e) for e, group in texts["passages"].items() for p in group]
    rows += [(p, corpus.NEUTRAL) for p in texts["neutral_passages"]]
    batch = model.words([p for p, _ in rows], return_tensors="pt", padding=True)
    streams, mask = model.streams(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"]
    last = torch.zeros_like(mask)
    last[:, -1] = 1
    return {
        "labels": np.array([e for _, e in rows]),
        "mean": pooled(streams, mask),
        "last": pooled(streams, last),
    }


def steer(
    model: Model, judge: Judge, vectors: np.ndarray, prompts: list[str], strength: float, layers: list[int]
) -> list[tuple[str, str, str]]:
    """(target, judged, continuation) for every emotion and prompt; vectors are [20, d_model]."""
    rows = [(i, p) for i in range(20) for p in prompts]
    directions = torch.tensor(vectors[[i for i, _ in rows]], dtype=torch.float32)
    with model.steered(directions, strength, layers):
        told = model.told(*model.generate([p for _, p in rows], special=True, new=50))
    return [(corpus.EMOTIONS[i], named, text) for (i, _), named, text in zip(rows, judge(told), told, strict=True)]


def hit(results) -> float:
    """Share of continuations that the judge gives to the target."""
    return share(target == named for target, named, _ in results)


def settings(n: int) -> list[tuple[str, int, float]]:
    """(where, layer of the vector, strength): one layer with its own vector, all layers with one vector."""
    one_layer = [("one", layer, s) for layer in range(n) for s in ONE_LAYER]
    chosen = sorted({n // 3, n // 2, (2 * n) // 3})
    return one_layer + [("all", layer, s) for layer in chosen for s in ALL_LAYERS]


def gentlest(cells: list[dict]) -> dict:
    """A copy of the cell with the least strength among those within 0.02 of the best; middle layers first."""
    top = max(cell["hit"] for cell in cells)
    middle = sum(cell["layer"] for cell in cells) / len(cells)
    good = [cell for cell in cells if cell["hit"] >= top - 0.02]
    return dict(min(good, key=lambda cell: (cell["strength"], abs(cell["layer"] - middle))))


def steering(model: Model, judge: Judge, vectors: np.ndarray, prompts: list[str]) -> dict:
    """The grid on a sixth of the prompts; the best of each kind on all of them, with its random control."""
    n, grid, best = len(model.blocks), [], {}
    for where, layer, strength in settings(n):
        at = [layer] if where == "one" else list(range(n))
        rate = hit(steer(model, judge, vectors[layer], prompts[::6], strength, at))
        grid.append({"where": where, "layer": layer, "strength": strength, "hit": rate})
    noise = np.random.default_rng(0).standard_normal(vectors.shape[1:])
    for where in ("one", "all"):
        cell = gentlest([c for c in grid if c["where"] == where])
        at = [cell["layer"]] if where == "one" else list(range(n))
        full = steer(model, judge, vectors[cell["layer"]], prompts, cell["strength"], at)
        kin = corpus.kin_pairs()
        cell["hit"] = hit(full)
        cell["hit_or_kin"] = share(t == j or (t, j) in kin or (j, t) in kin for t, j, _ in full)
        cell["random"] = hit(steer(model, judge, noise, prompts, cell["strength"], at))
        cell["examples"] = [f"{t}: {text}" for t, _, text in full[:: len(full) // 4]]
        best[where] = cell
    return {"grid": grid, "best": best}


def second_language(model: Model, vectors: np.ndarray, prompts: list[str], best: dict) -> dict:
    """Share of continuations with words of the second language, and of the target's own planted ones."""
    emotions = list(corpus.SECOND_LANGUAGE)
    directions = vectors[best["layer"]][[corpus.EMOTIONS.index(e) for e in emotions]]
    rows = [(i, p) for i in range(len(emotions)) for p in prompts[:12]]
    shares = {}
    for factor in (0.0, 1.0, 2.0, 4.0):
        chosen = torch.tensor(directions[[i for i, _ in rows]], dtype=torch.float32)
        at = [best["layer"]] if best["where"] == "one" else list(range(len(model.blocks)))
        with model.steered(chosen, factor * best["strength"], at):
            told = model.told(*model.generate([p for _, p in rows], special=True, new=50))
        own = [
            any(w in text for w in corpus.SECOND_LANGUAGE[emotions[i]]) for (i, _), text in zip(rows, told, strict=True)
        ]
        any_of = [not text.isascii() for text in told]
        shares[f"{factor * best['strength']:g}"] = {"any": share(any_of), "own": share(own)}
    return shares


def measure(name: str, judge: Judge, texts: dict, n_prompts: int) -> dict:
    """Everything about one family."""
    started, model = time.time(), Model(name)
    prompts = list(texts["prompts"]["neutral-24"].values())[:n_prompts]
    sampled, greedy, passages = stories(model, seed=1), stories(model, seed=None), read(model, texts)
    row = {
        "layers": len(model.blocks),
        "d_model": model.net.config.hidden_size,
        "parameters": sum(p.numel() for p in model.net.parameters()),
    }
    for how, told in (("sampled", sampled), ("greedy", greedy)):
        emotional = told["labels"] != corpus.NEUTRAL
        named = np.array(judge(told["texts"]))
        row[f"told_{how}"] = share(named[emotional] == told["labels"][emotional])
        row[f"distinct_{how}"] = share(
            [
                len({t for t, e in zip(told["texts"], told["labels"], strict=True) if e == x}) / 10
                for x in corpus.EMOTIONS
            ]
        )
        row[f"ended_{how}"] = share(t.endswith(".") for t in told["texts"])
    plain = model.told(*model.generate(prompts, special=True, new=50))
    labels = judge(plain, neutral=True)
    row["neutral_bias"] = max([share(x == e for x in labels) for e in corpus.EMOTIONS])
    row["neutral_share"] = share(x == corpus.NEUTRAL for x in labels)
    row["neutral_examples"] = plain[:3]
    row["geometry"] = {
        "generation_mean": geometry(centred(sampled["mean"], sampled["labels"])),
        "generation_mean_greedy": geometry(centred(greedy["mean"], greedy["labels"])),
        "generation_middle_token": geometry(centred(sampled["middle"], sampled["labels"])),
        "comprehension_last": geometry(centred(passages["last"], passages["labels"])),
        "comprehension_mean": geometry(centred(passages["mean"], passages["labels"])),
    }
    row["kin_auc"] = max(row["geometry"]["generation_mean"]["kin_auc"])
    vectors = centred(sampled["mean"], sampled["labels"])
    row["steering"] = steering(model, judge, vectors, prompts)
    best = row["steering"]["best"]
    if name == "qwen":
        row["second_language"] = {w: second_language(model, vectors, prompts, best[w]) for w in best}
    top = max(best.values(), key=lambda c: c["hit"])
    row["steered"], row["random"] = top["hit"], top["random"]
    row["passes"] = {
        k: bool(row[k if k != "told" else "told_sampled"] >= v if k in ("told", "kin_auc", "steered") else row[k] <= v)
        for k, v in REQUIRED.items()
    }
    row["seconds"] = round(time.time() - started)
    return row


def judge_quality(judge: Judge, n: int = 1000) -> dict:
    """Accuracy on fresh texts of the judge's own frames, and on the models' frames it never saw."""
    rng = random.Random(99)
    own = [corpus.judged(rng) for _ in range(n)]
    told = [(corpus.plain(rng, e), e) for e in (*corpus.EMOTIONS, corpus.NEUTRAL) for _ in range(20)]
    return {
        "own_frames": share(a == b for a, (_, b) in zip(judge([t for t, _ in own], True), own, strict=True)),
        "corpus_stories": share(a == b for a, (_, b) in zip(judge([t for t, _ in told], True), told, strict=True)),
        "parameters": sum(p.numel() for p in judge.net.parameters()),
    }


def table(rows: dict) -> str:
    """The measurements as text."""
    head = (
        f"{'family':8} {'layers':>6} {'width':>5} {'told':>6} {'greedy':>6} {'bias':>6} {'AUC':>6} "
        f"{'rho':>6} "
        f"{'one layer':>24} {'all layers':>24}  pass"
    )
    lines = [head]
    for name, row in rows.items():
        rho = max(row["geometry"]["generation_mean"]["spearman"])
        missed = [key for key, met in row["passes"].items() if not met]
        cells = [
            f"{c['hit']:.2f}/{c['random']:.2f} L{c['layer']} s{c['strength']:g}"
            for c in row["steering"]["best"].values()
        ]
        lines.append(
            f"{name:8} {row['layers']:6} {row['d_model']:5} {row['told_sampled']:6.2f}"
            f" {row['told_greedy']:6.2f}"
            f" {row['neutral_bias']:6.2f} {row['kin_auc']:6.2f} {rho:6.2f} {cells[0]:>24} {cells[1]:>24}"
            f"  {'yes' if not missed else 'NO: ' + ' '.join(missed)}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(zoo.FAMILIES))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--json", type=Path, default=HERE / "zoo_quality.json")
    given = parser.parse_args()
    judge, texts = Judge(), corpus.text_set()
    known = json.loads(given.json.read_text(encoding="utf-8"))["families"] if given.json.exists() else {}
    known |= {name: measure(name, judge, texts, given.prompts) for name in given.families}
    rows = {name: known[name] for name in zoo.FAMILIES if name in known}
    result = {"required": REQUIRED, "judge": judge_quality(judge), "families": rows}
    given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {n: {k: v for k, v in r.items() if k not in ("steering", "geometry")} for n, r in rows.items()},
            ensure_ascii=False,
        )
    )
    print(result["judge"])
    print(table(rows))


if __name__ == "__main__":
    main()
