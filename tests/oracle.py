"""What nsteer computes, computed another way: plain torch forward hooks, one text at a time.

No batch, no padding, no KV cache (every step runs the whole text again), no nnsight, nothing of nsteer. An edit
of a position depends on that position's stream alone, and on the prompt's mean norm under a live scale: so a
full forward over prompt and continuation gives what a cached, batched run must give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Push:
    """One edit, at `site` of block `layer`; `live`: strength in mean norms of what stands there, skipping `skip`."""

    layer: int
    op: str
    vector: np.ndarray
    strength: float
    live: bool = False
    positions: str = "all"
    skip: int = 0
    mean: np.ndarray | None = None
    gate: np.ndarray | None = None
    low: float = -np.inf
    high: float = np.inf
    cosine: bool = False
    after: tuple[int, ...] = ()
    first: int | None = None
    linear: int | None = None
    half_life: float | None = None
    site: str = "resid_post"

    def touches(self, position: int, prompt: int, tokens=()) -> bool:
        if self.after and (position == 0 or tokens[position - 1] not in self.after):
            return False
        if position >= prompt and self.first is not None and position - prompt >= self.first:
            return False
        if position >= prompt:
            return self.positions in ("all", "generated")
        return self.positions in ("all", "prompt") or (self.positions == "last" and position == prompt - 1)

    def opens(self, h: torch.Tensor) -> bool:
        """Whether the gate lets this stream through."""
        if self.gate is None:
            return True
        value = float(h @ torch.tensor(self.gate)) / (float(h.norm()) if self.cosine else 1.0)
        return self.low <= value <= self.high

    def pace(self, position: int, prompt: int) -> float:
        """What the strength is multiplied by at a position."""
        token = position - prompt
        if token < 0 or (self.linear is None and self.half_life is None):
            return 1.0
        return max(0.0, 1 - token / self.linear) if self.linear else 2.0 ** -(token / self.half_life)

    def where(self, stream: torch.Tensor, prompt: int, tokens) -> list[bool]:
        """Which positions of the stream before the edit are edited."""
        return [self.touches(p, prompt, tokens) and self.opens(h) for p, h in enumerate(stream)]

    def changed(self, stream: torch.Tensor, prompt: int, tokens=()) -> torch.Tensor:
        """The stream [position, d_model] after the edit."""
        vector = torch.tensor(self.vector, dtype=torch.float32)
        lengths = stream.square().sum(1).sqrt()
        mean = lengths[min(self.skip, prompt - 1) : prompt].mean()
        unit = torch.where(torch.arange(len(stream)) < prompt, mean, lengths) if self.live else torch.ones(len(stream))
        pace = torch.tensor([self.pace(p, prompt) for p in range(len(stream))])
        amount = self.strength * unit * pace
        touched = torch.tensor(self.where(stream, prompt, tokens))
        if self.op == "rotate":
            each = zip(stream, touched, self.strength * pace, strict=True)
            return torch.stack([turned(h, vector, float(s)) if t else h for h, t, s in each])
        along = stream @ vector
        usual = 0.0 if self.mean is None else float(self.mean @ self.vector)
        moved = {
            "add": amount,
            "project_out": -self.strength * pace * along,
            "clamp": amount - along,
            "set_mean": self.strength * pace * (usual - along),
            "affine": amount + usual - along,
        }[self.op]
        return stream + torch.outer(moved * touched, vector)


def turned(h: torch.Tensor, v: torch.Tensor, degrees: float) -> torch.Tensor:
    """h [d_model] turned towards v by an angle: spherical interpolation between h and v, or v's opposite."""
    start, length = (h / h.norm()).double(), h.norm().double()
    target = v.double() if degrees >= 0 else -v.double()
    between = torch.arccos((start @ target).clamp(-1, 1))
    share = min(np.deg2rad(abs(degrees)) / float(between), 1.0)
    mixed = torch.sin((1 - share) * between) * start + torch.sin(share * between) * target
    return (length * mixed / torch.sin(between)).float()


@dataclass
class Forward:
    """streams [layer][position, d_model] after all edits; logits [position, vocab]; receipts [edit, 4].

    sites: what stood at the other sites, by (layer, site).
    """

    streams: list[torch.Tensor]
    logits: torch.Tensor
    receipts: np.ndarray
    sites: dict[tuple[int, str], torch.Tensor]


def forward(
    module, blocks, tokens: Sequence[int], pushes: Sequence[Push] = (), prompt: int | None = None, inside=()
) -> Forward:
    """One forward pass over one text whose first `prompt` tokens (all) were given.

    inside: the modules of a block that add to the stream, (attention, MLP) by their names; needed at their sites alone.
    """
    prompt = len(tokens) if prompt is None else prompt
    sites: dict[tuple[int, str], torch.Tensor] = {}
    receipts = np.zeros((len(pushes), 4))

    def changed(layer, site, value):
        stream = value[0].float()
        for i, push in enumerate(pushes):
            if (push.layer, push.site) == (layer, site):
                new = push.changed(stream, prompt, tokens)
                receipts[i] = receipt(stream, new, push.where(stream, prompt, tokens))
                stream = new
        sites[layer, site] = stream
        return stream[None]

    def before(layer):
        return lambda _, given: (changed(layer, "resid_pre", given[0]), *given[1:])

    def after(layer, site):
        def act(_, __, output):
            if isinstance(output, tuple):
                return (changed(layer, site, output[0]), *output[1:])
            return changed(layer, site, output)

        return act

    handles = [block.register_forward_pre_hook(before(layer)) for layer, block in enumerate(blocks)]
    handles += [block.register_forward_hook(after(layer, "resid_post")) for layer, block in enumerate(blocks)]
    for name, site in zip(inside, ("attn_out", "mlp_out"), strict=False):
        for layer, block in enumerate(blocks):
            handles.append(block.get_submodule(name).register_forward_hook(after(layer, site)))
    try:
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()
    streams = [sites.pop((layer, "resid_post")) for layer in range(len(blocks))]
    return Forward(streams, logits, receipts, sites)


def receipt(before: torch.Tensor, after: torch.Tensor, touched: list[bool]) -> list[float]:
    """How many positions were touched, and the sums over them of relative change, cosine and ‖Δ‖."""
    b, a = before[touched].double(), after[touched].double()
    lengths = b.square().sum(1).sqrt()
    moved = (a - b).square().sum(1).sqrt()
    relative = moved / lengths
    cosine = (a * b).sum(1) / (lengths * a.square().sum(1).sqrt())
    return [sum(touched), float(relative.sum()), float(cosine.sum()), float(moved.sum())]


@dataclass
class Continuation:
    """tokens, end of text included; log-probs [step, vocab] before any choice; receipts [edit, 4]."""

    tokens: tuple[int, ...]
    logprobs: np.ndarray
    receipts: np.ndarray


def generate(
    module, blocks, tokens, pushes=(), *, new: int, eos=(), sampling=None, uniform=None, inside=()
) -> Continuation:
    """Greedy, or by inverse CDF with `sampling` = (temperature, top_k, top_p) and one number of `uniform` a step.

    The last token is never read again: it has no stream, so no edit touches it.
    """
    text, steps = list(tokens), []
    for step in range(new):
        out = forward(module, blocks, text, pushes, len(tokens), inside)
        logits = out.logits[-1]
        steps.append(logits.log_softmax(-1).numpy())
        chosen = int(logits.argmax()) if sampling is None else draw(logits.numpy(), uniform[step], *sampling)
        text.append(chosen)
        if chosen in eos:
            break
    return Continuation(tuple(text[len(tokens) :]), np.stack(steps), out.receipts)


def draw(logits: np.ndarray, u: float, temperature: float, top_k: int, top_p: float) -> int:
    """From the definition: likeliest first, at most k, the fewest whose mass reaches p; the inverse CDF."""
    z = logits.astype(np.float64) / temperature
    chances = np.exp(z - z.max())
    chances /= chances.sum()
    order = sorted(range(len(chances)), key=lambda i: (-chances[i], i))
    if top_k:
        order = order[:top_k]
    nucleus, mass = [], 0.0
    for token in order:
        nucleus.append(token)
        mass += chances[token]
        if mass >= top_p:
            break
    reached = 0.0
    for token in nucleus:
        reached += chances[token]
        if u * mass < reached:
            return token
    return nucleus[-1]


def pool(stream: torch.Tensor, kind: str, prompt: int, *, k: int = 0, over: str = "auto", skip: int = 0) -> np.ndarray:
    """One vector of a text's stream [position, d_model], from the definition; NaN for a missing value."""
    total = len(stream)
    generated = total > prompt if over == "auto" else over == "generated"
    if kind == "mid_generation":
        written = total - prompt
        return stream[prompt + written // 2 if written > 10 else prompt - 1].numpy()
    if kind == "last":
        return stream[-1].numpy()
    start = (prompt if generated else skip) + (k if kind == "mean_from" else 0)
    if start >= total:
        return np.full(stream.shape[1], np.nan)
    return stream[start:].double().mean(0).numpy()
