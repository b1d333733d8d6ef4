"""Finds the two modules of each block whose outputs it adds to the stream, by the numbers of one forward pass.

A block's output is its input, plus what its attention (or what mixes positions in its place) and its MLP give, each
perhaps times a number, plus perhaps one thing more. Which modules these are is not listed: the sum is seen to hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

SUMMANDS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
"""Modules of a block with norms after its sublayers (Gemma 2, OLMo 2, GLM 4), where they are what is added."""

MIXING = re.compile(r"attn|attention|self_att")
MIXING_INSTEAD = re.compile(r"mamba|mixer|conv|temporal_block|recurrent|ssm")
MIXES = re.compile(f"{MIXING.pattern}|{MIXING_INSTEAD.pattern}")
OTHER = re.compile(r"norm|ln|dropout")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2", "mlp_block")
FEEDING = re.compile(r"mlp|moe|ffn|feed_?forward|expert|fc\d")

MAX_MODULES = 48
"""Modules of a block that are tried: beyond them lie single experts and heads, which add nothing by themselves."""


@dataclass(frozen=True)
class Sublayer:
    """A module of a block whose output is added to the stream.

    path : its path in the block
    tuple_output : whether it gives a tuple, whose first entry is meant
    elsewhere : (block, path, tuple_output) of the blocks in which another module does it (hybrid models)
    factor : what the block multiplies its output by before it adds it (Granite)
    """

    path: str
    tuple_output: bool = False
    elsewhere: tuple[tuple[int, str, bool], ...] = ()
    factor: float = 1.0

    def at(self, layer: int) -> tuple[str, bool]:
        """Its path in one block, and whether it gives a tuple there."""
        return next(((path, many) for block, path, many in self.elsewhere if block == layer), self._usual)

    @property
    def paths(self) -> set[str]:
        """Every path that it has in some block."""
        return {self.path, *(path for _, path, _ in self.elsewhere)}

    @property
    def _usual(self) -> tuple[str, bool]:
        return self.path, self.tuple_output


Pair = tuple[Sublayer | None, Sublayer | None]


def by_name(blocks: Sequence[Any]) -> Pair:
    """The sublayers of blocks by the names of their children alone; none where a block has no such names."""
    named = [_named([name for name, _ in block.named_children()]) for block in blocks]
    if any(pair is None for pair in named):
        return None, None
    return joined([((attention, False), (mlp, False)) for attention, mlp in named if attention], (1.0, 1.0))  # type: ignore[misc]


def _named(names: Sequence[str]) -> tuple[str, str] | None:
    for pair in SUMMANDS:
        if set(pair) <= set(names):
            return pair
    mixing = [name for name in names if MIXING.search(name) and not OTHER.search(name)]
    mixing = mixing or [name for name in names if MIXING_INSTEAD.search(name) and not OTHER.search(name)]
    feeding = [name for name in FEED_FORWARD if name in names]
    return (mixing[0], feeding[0]) if mixing and feeding else None


@dataclass
class Block:
    """What was seen of one block in a forward pass: `before` and `after` it, and what every module inside gave.

    All are copies made when the module ended: some blocks add into a sublayer's output in place (Falcon).
    """

    before: Any = None
    after: Any = None
    given: list[tuple[str, Any, bool]] = field(default_factory=list)

    def keep(self, path: str, output: Any) -> None:
        """One module's output: kept where it is a tensor, or a tuple that begins with one."""
        import torch

        many = isinstance(output, (tuple, list))
        first = output[0] if many and output else output
        if isinstance(first, torch.Tensor):
            self.given.append((path, first.detach().clone(), many))

    def streams(self) -> dict[str, tuple[Any, bool]]:
        """path -> (what it gave, whether in a tuple), of the modules that ran once and gave a stream, shallow first."""
        names = [path for path, _, _ in self.given]
        fit = [
            (path, value.to(self.after.device), many)
            for path, value, many in self.given
            if names.count(path) == 1 and value.shape == self.after.shape
        ]
        fit = sorted(fit, key=lambda stream: stream[0].count("."))  # stable: among equals the order in which they ended
        outputs: dict[str, tuple[Any, bool]] = {}
        for path, value, many in fit:
            # else the projection at a module's end
            if not any(bool((value == other).all()) for other, _ in outputs.values()):
                outputs[path] = value, many
        ended = {path: i for i, path in enumerate(names)}
        return dict(sorted(list(outputs.items())[:MAX_MODULES], key=lambda item: ended[item[0]]))


def proved(blocks: Sequence[Block]) -> Pair:
    """The modules, attention first, that make each block's output of its input; (None, None) where none do in a block.

    One pair of names for all blocks where there is one, else (hybrid models) one for each block.
    """
    streams = [block.streams() for block in blocks]
    usual: tuple[float, ...] | None = None
    for (attention, mlp), ratios in _candidates(blocks[0], streams[0]):
        usual = usual or ratios
        again = (_holds(block, given, attention, mlp) for block, given in zip(blocks, streams, strict=True))
        if all(block_ratios is not None and _same(block_ratios, ratios) for block_ratios in again):
            return joined([_both(given, attention, mlp) for given in streams], ratios)
    chosen = []
    for block, given in zip(blocks, streams, strict=True):
        pair = next(_candidates(block, given), None)
        if pair is None or usual is None or not _same(pair[1], usual):
            return None, None
        chosen.append(_both(given, *pair[0]))
    return (None, None) if usual is None else joined(chosen, usual)


def _candidates(block: Block, given: dict[str, tuple[Any, bool]]) -> Iterator[tuple[tuple[str, str], tuple]]:
    """Pairs of modules that make a block's output, those named after attention first, and the factors they have."""
    mixed, fed = _first(block, MIXES), _first(block, FEEDING)
    ended = {path.partition(".")[0]: i for i, (path, _, _) in enumerate(block.given)}
    for attention, mlp in sorted(combinations(given, 2), key=_rank):
        first, last = (ended[path.partition(".")[0]] for path in (attention, mlp))
        if not mixed <= first < fed <= last:
            continue  # not the attention's and then the MLP's: sites stand in that order
        if (ratios := _holds(block, given, attention, mlp)) is not None:
            yield (attention, mlp), ratios


def _rank(pair: tuple[str, str]) -> tuple:
    attention, mlp = pair
    return attention.count(".") + mlp.count("."), not MIXING.search(attention)


def _first(block: Block, names: re.Pattern[str]) -> float:
    """Where in the order of a block's modules the first child of such a name ended; infinite where there is none."""
    children = [(i, path) for i, (path, _, _) in enumerate(block.given) if "." not in path and names.search(path)]
    places = [i for i, path in children if not OTHER.search(path)] or [i for i, _ in children]
    return places[0] if places else float("inf")


def _holds(block: Block, given: dict[str, tuple[Any, bool]], attention: str, mlp: str) -> tuple[float, float] | None:
    """What the two outputs are multiplied by where they make the block's output, with one thing more at most."""
    if attention not in given or mlp not in given:
        return None
    before, pair = block.before.to(block.after.device), (given[attention][0], given[mlp][0])
    if "." in attention + mlp:
        return (1.0, 1.0) if adds_up(before, *pair, block.after) else None
    if (ratios := factors(before, *pair, block.after)) is not None:
        return ratios
    further = [path for path in given if "." not in path and path not in (attention, mlp) and not FEEDING.search(path)]
    more = [given[path][0] for path in further]  # not what is half of an MLP: its other half would pass for the whole
    tried = (weights(before, (*pair, third), block.after) for third in more)
    return next((ratios[:2] for ratios in tried if ratios is not None), None)


def adds_up(before: Any, attention: Any, mlp: Any, after: Any) -> bool:
    """Whether after = before + attention + mlp up to rounding, which it is not without either of them."""
    return _each_counts([tensor.to(after.device).float() for tensor in (before, attention, mlp)], after)


def factors(before: Any, attention: Any, mlp: Any, after: Any) -> tuple[float, float] | None:
    """What a block multiplies the two by before it adds them; None where they do not make up its output."""
    return (1.0, 1.0) if adds_up(before, attention, mlp, after) else weights(before, (attention, mlp), after)


def weights(before: Any, terms: Sequence[Any], after: Any) -> Any:
    """What each term is multiplied by where after = s·(before + sum of factor·term) up to rounding; else None.

    Least squares in float64. Refused where a factor is not above 0, and where the sum holds without one of the terms.
    """
    import torch

    columns = [tensor.to(after.device).float() for tensor in (before, *terms)]
    table = torch.stack([column.flatten().double() for column in columns], 1).cpu()
    if not torch.isfinite(table).all() or len(table) < 4 * table.shape[1]:
        return None
    scales = torch.linalg.lstsq(table, after.flatten().double().cpu()[:, None], driver="gelsd").solution[:, 0].tolist()
    terms = [c * column for c, column in zip(scales, columns, strict=True)]
    if min(scales) <= 0 or not _each_counts(terms, after, of=0):  # of 0: what lacks the input fits it times nearly 0
        return None
    return tuple(c / scales[0] for c in scales[1:])


def _each_counts(terms: Sequence[Any], after: Any, of: int = 1) -> bool:
    """Whether the terms make up `after`, up to rounding, and do not without any of them from number `of` on."""
    import torch

    allowed = 4 * torch.finfo(after.dtype).eps * (sum(term.abs() for term in terms) + after.float().abs())

    def holds(chosen: Sequence[Any]) -> bool:
        return bool(((after.float() - sum(chosen)).abs() <= allowed).all())

    return holds(terms) and not any(holds([*terms[:i], *terms[i + 1 :]]) for i in range(of, len(terms)))


def _same(ratios: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two blocks use the same factors: in narrow dtypes they are seen to a percent."""
    return all(abs(a - b) <= 0.02 * max(abs(a), abs(b)) for a, b in zip(ratios, others, strict=True))


def _both(given: dict[str, tuple[Any, bool]], attention: str, mlp: str) -> tuple[tuple[str, bool], tuple[str, bool]]:
    return (attention, given[attention][1]), (mlp, given[mlp][1])


def joined(chosen: Sequence[tuple[tuple[str, bool], tuple[str, bool]]], ratios: Sequence[float]) -> Pair:
    """The two sublayers of all blocks, from those of each: those of the first block, and where others differ."""
    sublayers = []
    for of_blocks, ratio in zip(zip(*chosen, strict=True), ratios, strict=True):
        path, many = usual = of_blocks[0]
        elsewhere = tuple((i, *pair) for i, pair in enumerate(of_blocks) if pair != usual)
        sublayers.append(Sublayer(path, many, elsewhere, 1.0 if abs(ratio - 1) < 1e-3 else float(f"{ratio:.3g}")))
    return sublayers[0], sublayers[1]
