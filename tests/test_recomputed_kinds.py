"""Every kind of row of the claims table, from one planted store that has all of them, by the independent script: a kind
that the script does not know is a failure."""

from __future__ import annotations

import itertools
import json

import numpy as np
import planted
import pytest
import recompute
import test_claims
import xarray as xr
from scipy import stats

import nsteer
from nsteer.report import claims
from nsteer.science.presets import RATINGS
from nsteer.store import Group, Store, Variable, slug

MODELS = {
    "base/llama": ("llama", 24, 1.0e6),
    "wide/llama": ("llama", 32, 40.0e6),
    "qwen-2": ("qwen3", 24, 1.2e6),
    "qwen-2-instruct": ("qwen3", 24, 1.3e6),
}
EMOTIONS = test_claims.EMOTIONS
AXES = {"op": ["add", "cut"], "layer_set": ["all"], "method": ["generation", "comprehension"]}
AXES |= {"emotion": ["happy", "calm", "hostile"], "strength": [-0.1, 0.05, 0.1], "control": ["none", "random"]}
SETTINGS = {"add": {"op": "add", "strengths": {"kl": [0.05, 0.1]}}, "cut": {"op": "project_out", "strengths": [0.1]}}
CLASSES = test_claims.CLASSES
MAP = {"calm": {"rises": [], "falls": ["happy", "hostile"]}}
TARGETS = {e: {"rises": [e]} for e in ("happy", "hostile")} | MAP
SWAPS = 2


def altered(rng):
    """`planted.put`, with numbers that vary, a second judge, instructions, and two models without a chat template."""

    def put(store, path, coords, variables, *rest, **more):
        coords, variables = dict(coords), dict(variables)
        kind = path.split("/")[0]
        if coords.get("op") == ["add"]:  # of the unsteered: the same for both entries
            coords["op"], kept = AXES["op"], variables
            variables = {}
            for name, (dims, dtype, values) in kept.items():
                variables[name] = (dims, dtype, np.repeat(values, 2, dims.index("op")) if "op" in dims else values)
        if kind.startswith("judged"):
            dims, dtype, score = variables["score"]
            first = 0.6 * np.nan_to_num(score, nan=0.25) + 0.4 * rng.dirichlet(
                np.ones(4), score.shape[:-2] + (1,)
            ).swapaxes(-1, -2)
            both = np.concatenate(
                [first, 0.7 * first + 0.3 * rng.dirichlet(np.ones(4), first.shape[:-2] + (1,)).swapaxes(-1, -2)], -1
            )
            both[np.isnan(score).any(-2).squeeze(-1)] = np.nan
            coords["judge"], variables["score"] = ["j", "k"], (dims, dtype, both)
        if kind.startswith("outcomes"):
            dims, dtype, ratio = variables["perplexity"]
            variables["perplexity"] = (dims, dtype, ratio * rng.uniform(0.9, 1.1, ratio.shape))
        if kind == "samples":
            dims, _, text = variables["text"]
            numbers = np.broadcast_to(np.array([f"template {k}" for k in range(6)], object), text.shape)
            variables["instruction"] = (dims, "string", numbers.copy())
            variables["chat"] = (dims, "bool", np.full(text.shape, "llama" not in path))
        return planted.put(store, path, coords, variables, *rest, **more)

    return put


def further(store: Store, rng) -> None:
    """What `test_claims` does not plant: asked for in words, capability, swapped texts, settings, ratings."""
    models, rows = list(MODELS), test_claims.PROMPTS
    asked = {"model": models, "op": AXES["op"], "emotion": AXES["emotion"], "asked": ["towards", "away"], **rows}
    size = tuple(map(len, asked.values()))
    texts = {"text": (tuple(asked), "string", np.full(size, " a day", object))}
    texts["token_id"] = ((*asked, "token"), "int32", np.tile(np.arange(30), (*size, 1)))
    planted.put(store, "prompted", {**asked, "token": range(30)}, texts)
    score = rng.dirichlet(np.ones(4), (*size, 2)).swapaxes(-1, -2)
    where = {**asked, "class": CLASSES, "judge": ["j", "k"]}
    planted.put(store, "judged_prompted", where, {"score": (tuple(where), "float32", score)})
    cost = {"model": models, **AXES, "passage": range(5), "item": range(6), "choice": ["right", "a", "b", "c"]}
    grid = tuple(cost)[:7]
    sizes = {dim: len(labels) for dim, labels in cost.items()}

    def drawn(*dims: str) -> tuple:
        return dims, "float32", rng.normal(2.0, 0.5, [sizes[dim] for dim in dims])

    told = {"nll": drawn(*grid, "passage"), "kl": drawn(*grid), "log_likelihood": drawn(*grid, "item", "choice")}
    planted.put(store, "capability", cost, told)
    plain = {dim: cost[dim] for dim in ("model", "passage", "item", "choice")}
    told = {"nll": drawn("model", "passage"), "log_likelihood": drawn("model", "item", "choice")}
    planted.put(store, "capability_unsteered", plain, told)
    for model in models:
        width = MODELS[model][1]
        own = {
            "model": [model],
            "method": ["generation"],
            "emotion": EMOTIONS,
            "sample": range(6),
            "swap": range(SWAPS),
        }
        size = tuple(map(len, own.values()))
        others = np.array(
            [
                [
                    [
                        [
                            [
                                EMOTIONS[(e + 1 + i + k) % 6] if (1 + i + k) % 6 else EMOTIONS[(e + 1) % 6]
                                for i in range(SWAPS)
                            ]
                            for k in range(6)
                        ]
                        for e in range(6)
                    ]
                ]
            ],
            object,
        )
        activations = store.read(f"activations/{slug(model)}").pooled.sel({"method": ["generation"]}).load()
        read = activations.sel({"emotion": EMOTIONS}).transpose(
            "model", "method", "emotion", "sample", "layer", "d_model"
        )
        mixed = np.repeat(read.values[:, :, :, :, None], SWAPS, 4) + rng.normal(0, 0.8, (*size, 8, width))
        wide = {**own, "layer": range(8), "d_model": range(width)}
        told = {"asked": (tuple(own), "string", others), "pooled": (tuple(wide), "float32", mixed)}
        planted.put(store, f"swapped/{slug(model)}", wide, told)
    for path, dim, settings in (
        ("ops", "op", SETTINGS),
        ("judges", "judge", {j: {"unit": "probability", "classes": CLASSES, "map": MAP} for j in ("j", "k")}),
    ):
        store.prepare([Group(path, {dim: list(settings)}, {"settings": Variable((dim,), "string", "-")}, (dim,))])
        for label, options in settings.items():
            store.commit(path, (label,), xr.Dataset({"settings": ((), json.dumps(options))}), fingerprint=1)
    run = store.add_run(
        plan="name: all\nratings: nsteer-20\n", environment={}, started="2026-01-01T00:00:00+00:00", argv=[]
    )
    store.finish_run(run, "2026-01-01T00:01:00+00:00", "complete")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    store, rng = Store(tmp_path_factory.mktemp("kinds") / "s.zarr"), np.random.default_rng(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_claims, "MODELS", MODELS)
        patch.setattr(test_claims, "AXES", AXES)
        patch.setattr(test_claims, "put", altered(rng))
        test_claims.facts(store, list(MODELS))
        for model in MODELS:
            test_claims.derived(store, model, rng)
            test_claims.measured(store, model, rng)
        test_claims.steered(store, list(MODELS))
        test_claims.judged(store, list(MODELS))
        test_claims.projected(store, list(MODELS))
    further(store, rng)
    opened = nsteer.open(store.path)
    return opened, claims.table(claims.claims(opened, test_claims.QUICK, test_claims.TARGETS))


class Again:
    """The figures of rows, worked out from the arrays of the store."""

    def __init__(self, opened, table):
        self.opened, self.table = opened, table
        self.known: dict = {}

    def array(self, path: str, name: str) -> xr.DataArray:
        if (path, name) not in self.known:
            self.known[path, name] = self.opened[path][name].load()
        return self.known[path, name]

    def samples(self, model: str, method: str, layer: int):
        pooled = self.array(f"activations/{slug(model)}", "pooled").sel(
            {"model": model, "method": method, "layer": layer}
        )
        own = pooled.sel({"emotion": EMOTIONS}).transpose("emotion", "sample", "d_model").values.astype(float)
        return own, pooled.sel({"emotion": "neutral"}).transpose("sample", "d_model").values.astype(float)

    def vectors(self, model: str, method: str, layer: int) -> np.ndarray:
        vector_array = self.array(f"vectors/{slug(model)}", "vector").sel(
            {"model": model, "method": method, "layer": layer}
        )
        return vector_array.values.astype(float)

    def of(self, what: str, scope: str = ""):
        return self.table[self.table.what.str.startswith(what) & self.table.scope.str.startswith(scope)]

    # -- steering: each prompt's own emotion at its sign

    def aims(self):
        return {
            p: (t["emotion"], t["sign"])
            for p in test_claims.PROMPTS["prompt"]
            for t in [test_claims.TARGETS[p.rsplit("-", 1)[0]]]
        }

    def told(self, where: list[str], control: str, strength: float, judge: str = "j"):
        """Change of the target's score of each prompt, and whether the judge names it; NaN where it is not there."""
        model, op, layer_set, method = where
        steered = self.array("judged", "score").sel(
            {"model": model, "op": op, "layer_set": layer_set, "method": method}
        )
        plain = self.array("judged_unsteered", "score").sel({"model": model, "op": op, "judge": judge, "seed": 0})
        change, named = [], []
        for prompt, (emotion, sign) in self.aims().items():
            place = {"emotion": emotion, "control": control, "prompt": prompt, "judge": judge, "seed": 0}
            if sign * strength not in AXES["strength"]:
                change.append(np.nan)
                named.append(np.nan)
                continue
            scores = steered.sel({**place, "strength": sign * strength}).values
            unsteered = plain.sel({"prompt": prompt}).values
            target = TARGETS[emotion]
            change.append(
                sign * (recompute.score_of(scores, CLASSES, target) - recompute.score_of(unsteered, CLASSES, target))
            )
            named.append(
                np.nan if np.isnan(scores).any() else float(recompute.said(scores, CLASSES, target) == (sign > 0))
            )
        return np.array(change), np.array(named)

    def grid(self, where: list[str], control: str = "none") -> np.ndarray:
        return np.array([self.told(where, control, s)[0] for s in (0.05, 0.1)])

    def regimes(self, where: list[str], **at) -> xr.DataArray:
        """The regime of each text of the vector itself, (emotion, strength, prompt)."""
        model, op, layer_set, method = where
        labels = {"model": model, "op": op, "layer_set": layer_set, "method": method, "control": "none", "seed": 0}
        ids = self.array("generations", "token_id").sel(labels)
        above = self.array("outcomes", "perplexity").sel(labels)
        below = self.array("outcomes_unsteered", "perplexity").sel({"model": model, "op": op, "seed": 0})
        out = np.empty(above.shape, object)
        for i in np.ndindex(above.shape):
            ratio = above.values[i] / below.sel({"prompt": above.prompt.values[i[-1]]}).values
            out[i] = recompute.regime([t for t in ids.values[i].tolist() if t >= 0], ratio)
        return above.copy(data=out)

    def usable(self, where: list[str]) -> np.ndarray:
        told = self.regimes(where)
        return np.array([(told.sel({"strength": s}) == "surgical").mean("emotion").values for s in (0.05, 0.1)])

    def place(self, where: list[str]) -> list[int]:
        return recompute.chosen(self.grid(where), self.usable(where))


def mean(values) -> dict:
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return {"value": known.mean(), "n": len(known)}


def share(k: float, n: int) -> dict:
    low, high = recompute.wilson(k, n)
    return {"value": k / n, "n": n, "low": low, "high": high}


def cosines(a: Again, model: str) -> list[float]:
    return [recompute.jackknife_by_folds(*a.samples(model, m, 4))[0] for m in ("generation", "comprehension")]


def over_models(a: Again) -> tuple[list[float], list[float]]:
    if "over" not in a.known:
        a.known["over"] = tuple(map(list, zip(*(cosines(a, m) for m in MODELS), strict=True)))
    return a.known["over"]


def better(a, row):
    generation, comprehension = cosines(a, row.scope)
    return {"value": pytest.approx(generation - comprehension, abs=3e-3)}


def models_better(a, row):
    k = sum(x < y for x, y in zip(*over_models(a), strict=True))
    return {**share(k, 4), "p": recompute.binomial(k, 4, 0.5)}


def moved_over_models(a, row):
    generation, comprehension = over_models(a)
    p = stats.mannwhitneyu(generation, comprehension, method="exact").pvalue
    return {"value": pytest.approx(recompute.hodges_lehmann(generation, comprehension), abs=3e-3), "p": p}


def d(a, row):
    return {"value": pytest.approx(recompute.cohens_d(*over_models(a)), rel=0.05)}


def paired(a, row):
    apart = np.subtract(*over_models(a))
    return {"value": pytest.approx(apart.mean(), abs=3e-3), "p": recompute.sign_flips(apart)}


def varies(a, row):
    each = a.of("generation separates")
    sd, p = recompute.spread(each.value.values, ((each.high - each.low) / (2 * 1.96)).values)
    return {"value": pytest.approx(sd, rel=2e-3, abs=1e-4), "p": p}


def tuned_by_chat(a, row):
    each = a.of("generation separates").set_index("scope").value
    return {
        "value": recompute.hodges_lehmann(
            each[[m for m in MODELS if "llama" not in m]], each[[m for m in MODELS if "llama" in m]]
        )
    }


def two(scope: str) -> list[str]:
    return scope.split(", ")


def lowest(a, row):
    curve = [recompute.jackknife_by_folds(*a.samples(*two(row.scope), k))[0] for k in range(8)]
    return {"value": np.argmin(curve) / 8}


def most_accurate(a, row):
    model, method = two(row.scope)[:2]
    return {"value": np.argmax([recompute.accuracy(*a.samples(model, method, k)) for k in range(8)]) / 8}


def bent(a, row):
    curve = [recompute.jackknife_by_folds(*a.samples(*two(row.scope), k))[0] for k in range(8)]
    tolerance = 1e-3 if row.scope.endswith("generation") else 5e-2  # a bias of a ratio by another jackknife
    return {"value": pytest.approx(np.polyfit(np.arange(8) / 8, curve, 2)[0], rel=tolerance)}


def pinned(a, row):
    return {
        "value": pytest.approx(
            np.mean([recompute.pair_cosine(a.vectors(*two(row.scope), k)) for k in range(8)]), abs=1e-6
        )
    }


def with_scale(a, row):
    depth = a.of("depth at which held-out accuracy").set_index("scope").value
    sizes = [np.log10(MODELS[m][2]) for m in MODELS]
    return {"value": stats.linregress(sizes, [depth[f"{m}, comprehension"] for m in MODELS]).slope}


def anisotropic(a, row):
    pooled = a.array(f"anisotropy/{slug(row.scope)}", "pooled")
    return {
        "value": pytest.approx(
            recompute.pair_cosine(
                pooled.sel({"model": row.scope, "bos": row.what.split("bos ")[1], "layer": 4}).values.astype(float)
            ),
            abs=1e-6,
        )
    }


def strength_of(scope: str) -> tuple[list[str], float]:
    *where, last = scope.split(", ")
    return where, float(last.split()[1])


def moved(a, row):
    where, strength = strength_of(row.scope)
    models = list(MODELS) if "models" in where[0] else where[:1]
    each = {c: np.array([a.told([m, *where[1:]], c, strength)[0] for m in models]) for c in ("none", "random")}
    known = {c: np.where(np.isnan(v), np.nan, v > 0) for c, v in each.items()}
    hits = recompute.over_known(known["none"])
    hits = hits[~np.isnan(hits)]
    expected = share(hits.sum(), len(hits))
    if row.value < 0.8 and float(hits.sum()).is_integer():
        expected["p"] = recompute.binomial(hits.sum(), len(hits), 0.8)
    return expected


def sweet(a, row):
    where = two(row.scope)
    told, best = a.regimes(where), []
    steered = a.array("judged", "score").sel(
        dict(zip(("model", "op", "layer_set", "method"), where, strict=True))
        | {"judge": "j", "control": "none", "seed": 0}
    )
    plain = a.array("judged_unsteered", "score").sel({"model": where[0], "op": where[1], "judge": "j", "seed": 0})
    for emotion in AXES["emotion"]:
        rates = {}
        for strength in (0.05, 0.1):
            score = steered.sel({"emotion": emotion, "strength": strength}).transpose("prompt", "class").values
            change = [
                recompute.score_of(x, CLASSES, TARGETS[emotion]) - recompute.score_of(y, CLASSES, TARGETS[emotion])
                for x, y in zip(score, plain.transpose("prompt", "class").values, strict=True)
            ]
            if (told.sel({"emotion": emotion, "strength": strength}) == "surgical").mean() >= 0.8:
                rates[strength] = np.mean([c > 0 for c in change if not np.isnan(c)])
        best += [max(rates, key=lambda s: (rates[s], -s))] if rates else []
    return {"value": float(np.median(best))}


def transported(a, row):
    where = dict(zip(("model", "op", "layer_set", "method"), two(row.scope)[:4], strict=True))
    labels = {**where, "where": "prompt_end", "strength": 0.1, "control": "none", "seed": 0, "layer": 7}
    projection, put = a.array("projections", "projection").sel(labels), a.array("steering", "injected")
    there = {
        k: v
        for k, v in {**where, "where": "prompt_end", "seed": 0, "layer": 7}.items()
        if k in a.opened["projections_unsteered"].projection.dims
    }
    plain = a.array("projections_unsteered", "projection").sel(there)
    total = put.sel({k: v for k, v in labels.items() if k in put.dims and k != "layer"}).sum("layer")
    each = [
        [
            float(projection.sel({"emotion": e, "target": e, "prompt": p}) - plain.sel({"target": e, "prompt": p}))
            / float(total.sel({"emotion": e, "prompt": p}))
            for e in AXES["emotion"]
        ]
        for p in projection.prompt.values.tolist()
    ]
    return {"value": pytest.approx(np.mean(each), rel=1e-5)}


def effect(a, row):
    where, beyond = two(row.scope), a.grid(two(row.scope)) - a.grid(two(row.scope), "random")
    return mean(recompute.at(beyond, a.place(where)))


def selective(a, row):
    where = two(row.scope)
    labels = dict(zip(("model", "op", "layer_set", "method"), where, strict=True))
    steered = a.array("judged", "score").sel({**labels, "judge": "j", "control": "none", "seed": 0})
    plain = a.array("judged_unsteered", "score").sel({"model": where[0], "op": where[1], "judge": "j", "seed": 0})
    each = []
    for emotion in ("happy", "hostile"):  # calm is told by a set
        change = (steered.sel({"emotion": emotion, "strength": [0.05, 0.1]}) - plain).transpose(
            "strength", "prompt", "class"
        )
        each.append(
            recompute.selectivity(recompute.at(change.values.astype(float), a.place(where)), CLASSES.index(emotion))
        )
    return mean(recompute.over_known(np.array(each)))


def dosed(a, row):
    return mean(recompute.tau(a.grid(two(row.scope)), [0.05, 0.1]))


def against_words(a, row):
    where = two(row.scope)
    score = a.array("judged_prompted", "score").sel({"model": where[0], "op": where[1], "judge": "j", "seed": 0})
    plain = a.array("judged_unsteered", "score").sel({"model": where[0], "op": where[1], "judge": "j", "seed": 0})
    words = []
    for prompt, (emotion, sign) in a.aims().items():
        scores = score.sel({"emotion": emotion, "prompt": prompt, "asked": "towards" if sign > 0 else "away"}).values
        both = [
            recompute.score_of(x, CLASSES, TARGETS[emotion]) for x in (scores, plain.sel({"prompt": prompt}).values)
        ]
        words.append(sign * (both[0] - both[1]))
    return mean(recompute.at(a.grid(where) - np.array(words), a.place(where)))


def needed(a, row):
    change = a.grid(two(row.scope))[1]
    low, high = recompute.mean_t(change[~np.isnan(change)])
    return {**mean(change), "low": low, "high": high}


def matched(a, row):
    where = two(row.scope)[:3]
    both = [recompute.area(a.grid([*where, m]), [0.05, 0.1]) for m in AXES["method"]]
    return mean(both[0] - both[1])


def cost(name: str, unit: str):
    def cost_difference(a, row):
        where, strength = strength_of(row.scope)
        labels = dict(zip(("model", "op", "layer_set", "method"), where, strict=True)) | {
            "control": "none",
            "strength": strength,
        }
        steered, plain = (
            a.array(path, name).sel(at)
            for path, at in (("capability", labels), ("capability_unsteered", {"model": where[0]}))
        )
        told = [array.values for array in (steered, plain)]
        told = [recompute.right(array) for array in told] if unit == "item" else told
        each = (told[0] - told[1]).mean(0)
        low, high = recompute.mean_t(each.astype(float))
        return {**mean(each), "low": low, "high": high}

    return cost_difference


def surgical(a, row):
    where, strength = strength_of(row.scope)
    each = (a.regimes(where).sel({"strength": strength}) == "surgical").mean("emotion").values
    return share(each.sum(), len(each))


def rarest(a, row):
    best = dict.fromkeys(("surgical", "repetitive", "explosive"), 0.0)
    for where in itertools.product(MODELS, AXES["op"], AXES["layer_set"], AXES["method"]):
        told = a.regimes(list(where))
        for name in best:
            best[name] = max(best[name], float((told == name).mean("prompt").max()))
    return {"value": min(best.values())}


def by_author(a, row):
    text = a.array("generations", "text").sel({"model": row.scope, "control": "none"})
    assert row.ours.startswith(f"{recompute.author_label(text.values.ravel().tolist())};")
    return {}


def by_family(a, row):
    where = [AXES["op"][0], "all", AXES["method"][0]]  # the first setup of each model
    shares = {
        m: [
            float((a.regimes([m, *where]).sel({"strength": 0.1}) == r).mean())
            for r in ("surgical", "repetitive", "explosive")
        ]
        for m in MODELS
    }
    within, between = [], []
    for first, second in itertools.combinations(MODELS, 2):
        apart = np.abs(np.subtract(shares[first], shares[second])).sum() / 2
        (within if MODELS[first][0] == MODELS[second][0] else between).append(apart)
    return {"value": np.mean(between) - np.mean(within)}


def in_script(a, row):
    where, strength = strength_of(row.scope)
    labels = dict(zip(("model", "op", "layer_set", "method"), where, strict=True))
    text = a.array("generations", "text").sel({**labels, "strength": strength, "control": "none", "seed": 0})
    plain = a.array("unsteered", "text").sel({"model": where[0], "op": where[1], "seed": 0})
    return mean(
        [
            np.mean([recompute.foreign(str(t)) for t in text.sel({"prompt": p}).values.tolist()])
            - recompute.foreign(str(plain.sel({"prompt": p}).item()))
            for p in text.prompt.values.tolist()
        ]
    )


def promoting(a, row):
    token = a.array(f"lens/{slug(row.scope)}", "token").sel({"model": row.scope}).transpose("emotion", ...)
    k = sum(any(recompute.foreign(str(t)) > 0 for t in tokens.ravel()) for tokens in token.values)
    return share(k, token.sizes["emotion"])


def unsuppressed(a, row):
    return {"value": a.of("share of letters", "qwen-2-instruct").value.iloc[0]}


def rdm(a, model, method, layer=4):
    return recompute.distances(*a.samples(model, method, layer))


def two_methods(a, row):
    model = two(row.scope)[0]
    return {
        "value": pytest.approx(
            recompute.rank_correlation(*(rdm(a, model, m) for m in ("generation", "comprehension"))), abs=1e-6
        )
    }


def two_models(a, row):
    method = two(row.scope)[1]
    pairs = itertools.combinations(MODELS, 2)
    return {
        "value": pytest.approx(
            np.median([recompute.rank_correlation(rdm(a, x, method), rdm(a, y, method)) for x, y in pairs]), abs=1e-6
        )
    }


def two_layers(a, row):
    model, method = two(row.scope)[:2]
    return {
        "value": pytest.approx(
            np.median(
                [
                    recompute.rank_correlation(rdm(a, model, method), rdm(a, model, method, k))
                    for k in range(8)
                    if k != 4
                ]
            ),
            abs=1e-6,
        )
    }


def component(k: int, scale: str):
    def correlation(a, row):
        model, method, layer = two(row.scope)
        score = recompute.first_component(a.vectors(model, method, int(layer.split()[1])), k)
        ratings = RATINGS["nsteer-20"].scales[scale]
        return {"value": abs(recompute.rank_correlation(score, np.array([ratings[e] for e in EMOTIONS])))}

    return correlation


def split(a, row):
    from nsteer.plan import texts

    model, method, layer = two(row.scope)
    sides, groups = (
        recompute.two_sides(a.vectors(model, method, int(layer.split()[1]))),
        texts.load(texts.find("nsteer")).emotions,
    )
    told = [(s, groups[e]) for s, e in zip(sides, EMOTIONS, strict=True) if groups[e] in ("positive", "negative")]
    same = sum((s == 1) == (g == "positive") for s, g in told)
    return share(max(same, len(told) - same), len(told))


def followed(a, row):
    model, method, layer = two(row.scope)
    layer = int(layer.split()[1])
    kept = a.array(f"swapped/{slug(model)}", "pooled").sel(
        {"model": model, "method": method, "layer": layer, "emotion": EMOTIONS}
    )
    asked = a.array(f"swapped/{slug(model)}", "asked").sel({"model": model, "method": method, "emotion": EMOTIONS})
    which = np.vectorize(EMOTIONS.index)(asked.transpose("emotion", "sample", "swap").values)
    read = kept.transpose("emotion", "sample", "swap", "d_model").values.astype(float)
    k, n = recompute.follows(*a.samples(model, method, layer), read, which)
    return {**share(k, n), "p": recompute.binomial(k, n, 0.5)}


def judges_alike(kind: str):
    def agreement(a, row):
        model = two(row.scope)[0]
        score = a.array("judged", "score").sel({"model": model}).transpose("emotion", "strength", ..., "class", "judge")
        out: dict[str, list] = {"j": [], "k": []}
        for e, emotion in enumerate(AXES["emotion"]):
            for s, strength in enumerate(AXES["strength"]):
                for array in score.values[e, s].reshape(-1, len(CLASSES), 2):
                    if np.isnan(array).any():
                        continue
                    for i, judge in enumerate(out):
                        told = recompute.said(array[:, i], CLASSES, TARGETS[emotion]) == (strength > 0)
                        out[judge].append(
                            told if kind == "named" else recompute.score_of(array[:, i], CLASSES, TARGETS[emotion])
                        )
        first, second = out.values()
        value = (
            recompute.kappa(first, second)
            if kind == "named"
            else recompute.weighted_kappa(np.array(first), np.array(second))
        )
        return {"value": pytest.approx(value, abs=1e-5)}

    return agreement


KINDS = {
    "generation separates emotions better": better,
    "models in which generation separates better": models_better,
    "shift of the methods' values over models": moved_over_models,
    "Cohen's d of the two methods' values": d,
    "mean difference of the methods over models, paired": paired,
    "the advantage varies between models": varies,
    "the advantage differs with instruction tuning": tuned_by_chat,
    "depth at which emotions are separated best": lowest,
    "depth at which held-out accuracy is highest": most_accurate,
    "a U over depth": bent,
    "layer choice by mean pairwise cosine of the vectors as stored": pinned,
    "the depth of the highest held-out accuracy is the same": with_scale,
    "anisotropy: mean pairwise cosine": anisotropic,
    "steering moves a scenario to its target class": moved,
    "sweet spot of strength": sweet,
    "steering delta on the target": transported,
    "change of P(target class), vector minus controls": effect,
    "change of P(target class) minus that of its strongest rival": selective,
    "change of P(target class) with strength": dosed,
    "change of P(target class), vector minus asking for it in words": against_words,
    "change of P(target class) when the direction is projected out": needed,
    "change of P(target class) at equal KL": matched,
    "rise of the NLL of the capability passages": cost("nll", "passage"),
    "change of the share of capability questions answered rightly": cost("log_likelihood", "item"),
    "regimes of continuations at the largest strength": surgical,
    "share of the rarest of the three regimes": rarest,
    "one label a model by the rule of the author's later code": by_author,
    "regimes are set by architecture rather than scale": by_family,
    "share of letters in another script": in_script,
    "emotions that promote tokens of another script": promoting,
    "instruction tuning does not suppress it": unsuppressed,
    "RDM correlation of two": two_methods,
    "RDM correlation between models": two_models,
    "RDM correlation of layers": two_layers,
    "correlation of component 1 of the emotion vectors with valence": component(0, "valence"),
    "correlation of component 2 of the emotion vectors with arousal": component(1, "arousal"),
    "emotions on the side of their valence pole": split,
    "vectors follow the text, not its instruction": followed,
    "agreement of judges: whether a text is of the class": judges_alike("named"),
    "agreement of judges: score of the class": judges_alike("target"),
}
"""What a row says, as far as it is the same of all rows of a kind -> how its figures are worked out again."""


def kind_of(what: str) -> str | None:
    return next((kind for kind in KINDS if what.startswith(kind)), None)


def test_the_script_knows_every_kind_and_the_store_has_all(both):
    _, table = both
    assert not [what for what in table.what if kind_of(what) is None], "work these out in recompute.py"
    measured = {
        kind_of(row.what)
        for row in table.itertuples()
        if not np.isnan(row.value) or kind_of(row.what).startswith("one label")
    }
    assert measured == set(KINDS), set(KINDS) - measured


@pytest.mark.parametrize("kind", KINDS)
def test_its_figures_are_those_of_the_table(both, kind):
    opened, table = both
    again, seen = Again(opened, table), 0
    rows = [row for row in table.itertuples() if kind_of(row.what) == kind]
    for row in [row for row in rows if not np.isnan(row.value) or kind.startswith("one label")][:4]:
        for name, value in KINDS[kind](again, row).items():
            wanted = value if isinstance(value, type(pytest.approx(0.0))) else pytest.approx(value, rel=1e-5, abs=1e-7)
            assert getattr(row, name) == wanted, f"{name} of {row.scope}"
        seen += 1
    assert seen
