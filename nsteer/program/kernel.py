"""The pieces of compiled programs: pure functions on tensors whose code the compiler embeds.

They use torch alone, cast to float32 before they reduce and never call matmul or einsum under autocast, so
that they give the same numbers in this process, on an NDIF server and under half-precision autocast.
"""

from __future__ import annotations

import torch


def pool(stream, weights):
    """Weighted sum over positions: [row, position, d_model], [row, position] -> [row, d_model] in float32.

    Positions of weight 0 are dropped, not multiplied: padding may hold anything, NaN too.
    """
    weights = weights.to(stream.device)[:, :, None]
    return torch.where(weights > 0, stream.float() * weights, 0.0).sum(1)


def mean_norm(stream, weights):
    """Weighted mean of the stream's L2 norms: [row, position, d_model], [row, position] -> [row]."""
    weights = weights.to(stream.device)
    return torch.where(weights > 0, stream.float().norm(dim=-1) * weights, 0.0).sum(1)


def score(logits, tokens, weights):
    """Weighted sum of log P(token | what stands before it): logits [row, position, vocab] -> [row], in nats.

    `tokens` and `weights` [row, position]: a token's probability is read one position before it. Where its weight
    is 0 it does not count.
    """
    tokens, weights = tokens.to(logits.device)[:, 1:], weights.to(logits.device)[:, 1:]
    total = torch.zeros(len(tokens), device=logits.device)
    for row in range(len(tokens)):  # row by row: a float32 copy of all logits would be the largest thing in memory
        chosen = logits[row, :-1].float().log_softmax(-1).gather(-1, tokens[row][:, None])[:, 0]
        total[row] = torch.where(weights[row] > 0, chosen * weights[row], 0.0).sum()
    return total


def against(logits, tokens, weights, unedited):
    """What each row says of its tokens beside its unsteered row: logits [row, position, vocab] -> [row, 2] in nats.

    Weighted sums over tokens, read one position before them, as in `score`: KL(row ‖ unedited) of the two next-token
    distributions, and its log P(token) minus the row's. `unedited` [row]: the place of a row of the same tokens.
    """
    tokens, weights = tokens.to(logits.device)[:, 1:], weights.to(logits.device)[:, 1:]
    sums = torch.zeros(len(unedited), 2, device=logits.device)
    for row, other in enumerate(unedited.tolist()):
        there = weights[row] > 0
        own = logits[row, :-1][there].float().log_softmax(-1)
        base = logits[other, :-1][there].float().log_softmax(-1)
        gain = torch.where(own > float("-inf"), own.exp() * (own - base), 0.0).sum(-1)
        lost = (base - own).gather(-1, tokens[row][there][:, None])[:, 0]
        sums[row] = (torch.stack([gain, lost]) * weights[row][there]).sum(-1)
    return sums


def promote(weight, vectors, top):
    """The tokens that vectors promote most: weight [vocab, d_model], vectors [row, d_model] -> logits, ids [row, top].

    One matrix product, in float32 whatever the autocast around it.
    """
    with torch.autocast(weight.device.type, enabled=False):
        return (vectors.to(weight.device).float() @ weight.float().T).topk(top)


def edit(stream, change_of, vector, amount, mask, *more):
    """Adds `change_of(stream, vector, amount, *more)` where `mask` [row, position] is 1, in place.

    Returns the receipt [row, 4], summed over touched positions: how many, ‖Δ‖/‖h‖, cosine of h before and
    after, ‖Δ‖; measured on the stream as it is afterwards, rounding to its dtype included.
    """
    mask = mask.to(stream.device).bool()
    before = stream.to(torch.float32, copy=True)
    change = change_of(before, *(array.to(stream.device) for array in (vector, amount, *more)))
    stream += torch.where(mask[:, :, None], change, 0.0).to(stream.dtype)
    after = stream.float()
    length = before.norm(dim=-1).clamp(min=1e-12)
    moved = (after - before).norm(dim=-1)
    relative = moved / length
    cosine = (after * before).sum(-1) / (length * after.norm(dim=-1).clamp(min=1e-12))
    touched = [torch.where(mask, value, 0.0).sum(1) for value in (torch.ones_like(moved), relative, cosine, moved)]
    return torch.stack(touched, -1)


def live_norm(stream, weights, later):
    """What a live amount is multiplied by while a text is read: [row, position, d_model] -> [row, position].

    Of given positions the weighted mean norm of theirs (`weights`), of `later` ones, as when they were written one at a
    time, each its own.
    """
    own = stream.float().norm(dim=-1)
    return torch.where(later.to(stream.device) > 0, own, mean_norm(stream, weights)[:, None])


def edit_each(stream, change_of, vector, amount, mask, *more):
    """`edit` with an amount [row, position]: positions go through it as rows of one position each."""
    rows, positions, width = stream.shape
    flat = stream.reshape(rows * positions, 1, width).clone()
    vector, *spread = [array.to(stream.device).repeat_interleave(positions, 0) for array in (vector, *more)]
    receipt = edit(flat, change_of, vector, amount.reshape(-1), mask.reshape(-1, 1), *spread)
    stream.copy_(flat.reshape(rows, positions, width))
    return receipt.reshape(rows, positions, 4).sum(1)


def gate(stream, vector, low, high, cosine):
    """Where the stream's projection on `vector` (length 1), or its `cosine`, is in [low, high]: [row, position] bool.

    stream [row, position, d_model], vector [row, d_model], low and high [row].
    """
    stream = stream.float()
    projection = (stream * vector.to(stream.device)[:, None, :]).sum(-1)
    if cosine:
        projection = projection / stream.norm(dim=-1).clamp(min=1e-12)
    return (projection >= low.to(stream.device)[:, None]) & (projection <= high.to(stream.device)[:, None])


def among(tokens, ids):
    """Whether each token [row, 1] is one of its row's ids [row, any], -1 for none: [row, 1] bool."""
    return (tokens == ids.to(tokens.device)).any(-1, keepdim=True)


def of_rows(data, stay):
    """What a program's data hold for the rows `stay` [row] bool: in `uniform` a row is the first axis, else the second.

    Vectors are shared; what belongs to the prompt is not needed any more.
    """
    whole = ("inputs", "vectors", "prompt", "norm")
    later = {name: value for name, value in data.items() if name not in whole}
    mine = {name: value[stay] if name == "uniform" else value[:, stay] for name, value in later.items()}
    return {**data, **mine}


def draw(logits, uniform, temperature, top_k, top_p):
    """One token a row by inverse CDF: logits [row, vocab], uniform [row] in [0, 1) -> token ids [row].

    Probabilities are sorted, cut to the `top_k` likeliest (0: all) and to the least nucleus of mass `top_p`, and
    the row's own number picks one: a row's draw depends on nothing but its own logits and number.
    """
    chances, order = torch.sort((logits / temperature).softmax(-1), dim=-1, descending=True, stable=True)
    below = chances.cumsum(-1) - chances
    keep = below < top_p
    if top_k:
        keep[:, top_k:] = False
    chances = (chances * keep).double()
    target = uniform.to(logits.device).double()[:, None] * chances.sum(-1, keepdim=True)
    place = (chances.cumsum(-1) <= target).sum(-1, keepdim=True)
    place = torch.minimum(place, keep.sum(-1, keepdim=True) - 1)
    return order.gather(1, place)[:, 0]


def force(head, tokens):
    """Overwrites the head's output at the last position, in place, so that greedy decoding takes `tokens`."""
    head[:, -1] = 0.0
    head[torch.arange(len(tokens)), -1, tokens] = 1.0
