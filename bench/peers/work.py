"""The work of case g, the same for nsteer and every peer: what is asked, whether it is right, what it took, as JSON.

A peer is an object with `name`, `version`, and as many of these as it can do (a missing or failing one is named in
the line, never dropped):

    capture(texts, groups, layers)      -> [text, layer, d_model] of the residual stream after blocks, a batch a group
    one_vector(prompts, vector, new)    -> tokens [prompt, new], the same vector for every row: its documented way
    row_vectors(prompts, vectors, new)  -> tokens [row, new], a vector a row
    reads                               -> "mean" over a text's tokens, or "last" token
    own_batch                           -> texts a batch where its users batch by hand; absent: it batches by itself
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))

from subjects import END, model, texts
from timing import interleaved

LAYER, HALF, PER_PROMPT, PROMPTS = 6, 6, 16, 8
STRENGTHS = (2.0, 8.0, 32.0)  # raw multiples of unit vectors: what every peer adds
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Size:
    """How much is done: texts, conditions in the batch of rows, conditions of the loop, new tokens."""

    texts: int = 256
    conditions: int = 20
    loop: int = 6
    new: int = 32


@dataclass(frozen=True)
class Given:
    """What a peer gets to build itself."""

    device: str

    def model(self) -> Any:
        """A fresh GPT-2 124M: the same weights each time."""
        return fresh(self.device)


def fresh(device: str) -> Any:
    module = model("gpt2", device)
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = END
    return module


def directions(count: int) -> np.ndarray:
    """Unit vectors [vector, d_model]."""
    drawn = np.random.default_rng(0).normal(size=(count, 768)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def conditions(count: int) -> np.ndarray:
    """`count` conditions, vector times strength [condition, d_model]: the strengths take turns."""
    return directions(count) * np.array([STRENGTHS[i % 3] for i in range(count)], np.float32)[:, None]


def right(batch: Sequence[Sequence[int]], device: str) -> dict[str, torch.Tensor]:
    """A batch as tokenizers make it, padded on the right: positions are right without being named."""
    width = max(map(len, batch))
    ids = torch.tensor([[*tokens, *[END] * (width - len(tokens))] for tokens in batch])
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in batch])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def shares(mask: torch.Tensor) -> torch.Tensor:
    """Weights of a mean over each row's tokens [row, position, 1]."""
    return (mask / mask.sum(1, keepdim=True)).float()[..., None]


def word_tokenizer() -> Any:
    """A fast tokenizer of words `t17` that are token ids: for peers that take strings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(50257)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["input_ids", "attention_mask"]
    ends = {"pad_token": "t0", "eos_token": "t0", "bos_token": "t0", "unk_token": "t0"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=names, padding_side="right", **ends)


def spelled(ids: Sequence[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def grouped(count: int, size: int) -> list[list[int]]:
    """Texts in the given order, so many a batch: what users do."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


# --- the floors: plain transformers, in the same process ----------------------------------------------------------


def plain_forward(module: Any, asked: list[list[int]], groups: list[list[int]], device: str) -> None:
    with torch.no_grad():
        for group in groups:
            module(**right([asked[i] for i in group], device), use_cache=False)


def plain_generate(module: Any, prompts: list[list[int]], new: int, device: str) -> torch.Tensor:
    with torch.no_grad():
        tokens = module.generate(**right(prompts, device), max_new_tokens=new, do_sample=False, pad_token_id=END)
    return tokens[:, len(prompts[0]) :]


# --- what is right: plain transformers, one text at a time --------------------------------------------------------


def reference(module: Any, asked: list[list[int]], reads: str) -> dict[str, np.ndarray]:
    """Means or last tokens [text, layer, d_model] by `output_hidden_states`; the last block before ln_f and after."""
    streams: dict[str, list[np.ndarray]] = {"before": [], "after": []}
    last: list[torch.Tensor] = []
    handle = module.transformer.ln_f.register_forward_pre_hook(lambda _, given: last.append(given[0]))
    try:
        with torch.no_grad():
            for tokens in asked:
                states = module(**right([tokens], module.device.type), output_hidden_states=True).hidden_states[1:]
                for name, end in (("before", last.pop()), ("after", states[-1])):
                    stream = torch.stack([*states[:-1], end])[:, 0]
                    streams[name].append((stream.mean(1) if reads == "mean" else stream[:, -1]).cpu().numpy())
    finally:
        handle.remove()
    return {name: np.stack(value) for name, value in streams.items()}


def steered_by_hand(module: Any, prompt: list[int], vector: np.ndarray, new: int) -> list[int]:
    """Greedy tokens of one row, with the vector added at every position after block LAYER."""
    added = torch.as_tensor(vector).to(module.device)
    handle = module.transformer.h[LAYER].register_forward_hook(lambda _, given, stream: stream + added)
    try:
        return plain_generate(module, [prompt], new, module.device.type)[0].tolist()
    finally:
        handle.remove()


def check_capture(peer: Any, module: Any, asked: list[list[int]], groups: list[list[int]]) -> dict[str, Any]:
    """How far the peer's captures lie from the reference, all layers and the half one, in padded batches."""
    layers = list(range(12))
    want = reference(module, asked, peer.reads)
    captures, half = peer.capture(asked, groups, layers), peer.capture(asked, groups, [HALF])
    ends = {name: float(np.abs(captures[:, -1] - value[:, -1]).max()) for name, value in want.items()}
    end = min(ends, key=lambda name: ends[name])
    off = {
        "blocks before the last": float(np.abs(captures[:, :-1] - want["before"][:, :-1]).max()),
        "last block": ends[end],
        "half depth": float(np.abs(half[:, 0] - want["before"][:, HALF]).max()),
    }
    said = {key: float(f"{value:.2g}") for key, value in off.items()}
    right_ = all(value <= TOLERANCE for value in off.values())
    return {"right": right_, "reads": peer.reads, "last block is": f"{end} the final norm", "off by at most": said}


def check_tokens(tokens: Any, module: Any, prompts: list[list[int]], vectors: np.ndarray, new: int) -> dict[str, Any]:
    """Rows whose tokens are those of hooks by hand, one row at a time; and how many steering changed at all."""
    by_hand = [steered_by_hand(module, prompt, vector, new) for prompt, vector in zip(prompts, vectors)]
    unsteered = plain_generate(module, prompts, new, module.device.type).tolist()
    equal = sum(list(map(int, a)) == b for a, b in zip(tokens, by_hand))
    moved = sum(a != b for a, b in zip(by_hand, unsteered))
    return {"right": equal == len(by_hand) == len(tokens), "equal rows": equal, "of": len(by_hand), "moved": moved}


# --- the measuring ------------------------------------------------------------------------------------------------


def sides_of(peer: Any, module: Any, size: Size, groups: list[list[int]], device: str) -> dict[str, Any]:
    """Every timed side as (call, the number of texts or rows in it)."""
    asked, prompts = texts(size.texts), texts(PROMPTS, PER_PROMPT, PER_PROMPT)
    own = getattr(peer, "own_batch", None)
    batches = {"same batches": groups} | ({"own batches": grouped(size.texts, own)} if own else {})
    sides: dict[str, tuple[Callable[[], Any], int]] = {}
    if hasattr(peer, "capture"):
        for name, chosen in batches.items():
            for case, layers in (("a", list(range(12))), ("b", [HALF])):
                sides[f"{case}, {name}"] = (lambda c=chosen, at=layers: peer.capture(asked, c, at), size.texts)
            sides[f"plain forward, {name}"] = (lambda c=chosen: plain_forward(module, asked, c, device), size.texts)
    if hasattr(peer, "one_vector"):
        looped = conditions(size.loop)
        count = size.loop * PROMPTS
        sides["c, a vector a batch"] = (
            lambda: [peer.one_vector(prompts, vector, size.new) for vector in looped],
            count,
        )
        sides["plain generate, a vector a batch"] = (
            lambda: [plain_generate(module, prompts, size.new, device) for _ in looped],
            count,
        )
    if hasattr(peer, "row_vectors"):
        vectors = np.repeat(conditions(size.conditions), PROMPTS, axis=0)
        rows = prompts * size.conditions
        sides["c, a vector a row"] = (lambda: peer.row_vectors(rows, vectors, size.new), len(rows))
        sides["plain generate, a vector a row"] = (lambda: plain_generate(module, rows, size.new, device), len(rows))
    return sides


def checks_of(peer: Any, module: Any, new: int) -> dict[str, Any]:
    """Every ability on little work: whether it is right, or why it broke. This also warms everything up."""
    asked, prompts = texts(4), texts(PROMPTS, PER_PROMPT, PER_PROMPT)[:2]
    some = conditions(3)
    rows, vectors = prompts * 3, np.repeat(some, 2, axis=0)
    abilities: dict[str, Callable[[], dict[str, Any]]] = {
        "capture": lambda: check_capture(peer, module, asked, [[0, 1], [2, 3]]),
        "one_vector": lambda: check_tokens(
            [row for vector in some for row in peer.one_vector(prompts, vector, new)], module, rows, vectors, new
        ),
        "row_vectors": lambda: check_tokens(peer.row_vectors(rows, vectors, new), module, rows, vectors, new),
    }
    checks: dict[str, Any] = {}
    for name, check in abilities.items():
        if not hasattr(peer, name):
            checks[name] = {"right": None, "why": getattr(peer, "cannot", {}).get(name, "it has no such thing")}
            continue
        try:
            checks[name] = check()
        except Exception as error:  # a peer that breaks is a finding, whatever it raises
            checks[name] = {"right": False, "why": f"{type(error).__name__}: {error}"}
    return checks


def main(build: Callable[[Given], Any]) -> None:
    """The command line of a peer's script: builds it, checks it, measures it, prints one line of JSON."""

    @click.command()
    @click.option("--groups", type=click.File(), required=True, help="JSON: nsteer's batches, as indices of texts.")
    @click.option("--repeats", default=5)
    @click.option("--device", default="cpu")
    @click.option("--threads", default=1)
    @click.option("--texts", "count", default=Size.texts)
    @click.option("--conditions", "conditions", default=Size.conditions)
    @click.option("--loop", default=Size.loop)
    @click.option("--new", default=Size.new)
    @click.option("--check-only", is_flag=True)
    def command(
        groups: Any,
        repeats: int,
        device: str,
        threads: int,
        count: int,
        conditions: int,
        loop: int,
        new: int,
        check_only: bool,
    ) -> None:
        torch.set_num_threads(threads)
        module = fresh(device)
        peer = build(Given(device))
        checks = checks_of(peer, module, min(new, 8))
        for name, check in checks.items():  # what broke is not timed; what gives other numbers is, and said to
            if check["right"] is False and "why" in check and hasattr(type(peer), name):
                delattr(type(peer), name)
        sides = (
            {} if check_only else sides_of(peer, module, Size(count, conditions, loop, new), json.load(groups), device)
        )
        taken = interleaved({name: call for name, (call, _) in sides.items()}, repeats, warm=0)
        line = {
            "peer": peer.name,
            "version": peer.version,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "weights": round(float(sum(p.detach().double().abs().sum() for p in module.parameters())), 3),
            "checks": checks,
            "notes": getattr(peer, "notes", []),
            "sides": {
                name: {
                    "work": sides[name][1],
                    "cpu": timings.cpu,
                    "wall": timings.wall,
                    "peak_mb": max(timings.peak) / 2**20,
                }
                for name, timings in taken.items()
            },
        }
        print("\n" + json.dumps(line))

    command()
