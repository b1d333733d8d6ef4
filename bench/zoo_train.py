"""Corpus -> trained models: makes the embedded models, the judge and the text set again, seeded.

python bench/zoo_train.py [family ... | judge | texts | all] [--steps N] [--out DIR] [--seed S]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import zoo_corpus as corpus
import zoo_families as families

from nsteer.plan import texts as text_sets
from nsteer.zoo import FAMILIES, names, path

RATE = 4e-3
# Rounds of (steps, documents a step). Each round is a full cycle of the rate on new documents: families begun with
# small batches needed more than one before a sampled story kept to its emotion (and not to a kin of it).
ROUNDS = {
    "gpt2": ((1200, 16), (1000, 24), (600, 24)),
    "gemma": ((1600, 24),),
    "qwen": ((1400, 16), (1300, 24)),
    "llama": ((1400, 16), (900, 24), (600, 24)),
    "mistral": ((1600, 24),),
}
JUDGE_BATCH, JUDGE_RATE, JUDGE_STEPS = 64, 3e-3, 1000
DOCUMENTS = 60_000
LATE = 0.3  # share of batches whose positions start late, so learned positions beyond a story get trained


def encode(name: str, words: Any, docs: list[dict[str, str]]) -> list[list[int]]:
    """Token ids of each document, special tokens included, ended by the family's end of text."""
    family, rows = families.FAMILIES[name], []
    for doc in docs:
        if "text" in doc:
            ids = words(doc["text"])["input_ids"] + [words.eos_token_id]
        else:
            turns = [
                {"role": "user", "content": doc["user"]},
                {"role": "assistant", "content": doc["answer"]},
            ]
            text = words.apply_chat_template(turns, tokenize=False)
            ids = words(text[: text.rindex(family.turn) + len(family.turn)], add_special_tokens=False)["input_ids"]
        rows.append(ids)
    return rows


def batches(rows: list, size: int, rng: random.Random, length: Callable[[Any], int] = len) -> Iterator[list]:
    """Endless batches of rows of similar length, in random order."""
    while True:
        order = sorted(range(len(rows)), key=lambda i: (length(rows[i]), rng.random()))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        rng.shuffle(groups)
        yield from ([rows[i] for i in group] for group in groups)


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [batch, longest], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest)[None] < lengths[:, None]


def descend(model: Any, steps: int, rate: float, loss_of: Callable[[int], torch.Tensor], report: str) -> list[float]:
    """Minimise loss_of(step) with AdamW and a one-cycle rate; the losses, in nats."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 10), pct_start=0.08)
    losses, start = [], time.time()
    model.train()
    for step in range(steps):
        loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if report and (step + 1) % 100 == 0:
            print(
                f"{report} {step + 1} loss {sum(losses[-100:]) / 100:.4f} {time.time() - start:.0f}s",
                flush=True,
            )
    return losses


def train_family(
    name: str,
    out: Path,
    steps: int | None = None,
    seed: int = 0,
    documents: int = DOCUMENTS,
    report: bool = True,
) -> list[float]:
    """Train one language model into out/name: its rounds, or one of so many steps; losses in nats per token."""
    torch.manual_seed(seed)
    second, losses = families.FAMILIES[name].second, []
    # The tokenizer learns from documents of a fixed seed, so it does not depend on how much is trained.
    words = families.tokenizer(name, spelled(name, corpus.documents(8000, 1, second), second))
    model = families.model(name, words)
    rounds = ((steps, ROUNDS[name][0][1]),) if steps else ROUNDS[name]
    for k, (count, batch) in enumerate(rounds):
        docs = held_out(corpus.documents(documents if k == 0 else count * batch, seed + k, second))
        source = batches(encode(name, words, docs), batch, random.Random(seed + k))
        losses += descend(model, count, RATE, reader(name, model, words, source), name if report else "")
        model.half().float()  # a round begins from weights as they are kept
    write(out / name, model, words)
    return losses


def reader(name: str, model: Any, words: Any, source: Iterator[list]) -> Callable[[int], torch.Tensor]:
    """The function step -> loss of the model on the next batch, in nats per token."""

    def loss_of(step: int) -> torch.Tensor:
        ids, mask = padded(next(source), words.pad_token_id)
        late = {}
        if name == "gpt2" and random.Random(step).random() < LATE:
            shift = random.Random(step + 1).randrange(families.POSITIONS - ids.shape[1])
            late = {"position_ids": torch.arange(ids.shape[1])[None] + shift}
        return model(input_ids=ids, labels=ids.masked_fill(~mask, -100), **late).loss

    return loss_of


def spelled(name: str, docs: list[dict[str, str]], second: bool) -> Iterator[str]:
    """Texts as the tokenizer will meet them, every corpus word with and every first word without a space."""
    for doc in docs:
        if second and not "".join(doc.values()).isascii():
            continue
        yield from (
            doc.values()
            if name not in ("gpt2", "mistral")
            else (doc.get("text", doc.get("user", "")), " " + doc.get("answer", ""))
        )
    for word in corpus.vocabulary(second):
        yield " " + word
        if not word.isascii():
            yield word
    yield from ("User:", "Story:", "user\n", "model\n", "assistant\n", "system\n")


def held_out(docs: list[dict[str, str]]) -> list[dict[str, str]]:
    """The documents without those that contain a passage of the text set."""
    texts = corpus.text_set()
    kept = {p for group in texts["passages"].values() for p in group} | set(texts["neutral_passages"])
    return [doc for doc in docs if not any(part.split("\n")[0].split(" how does ")[0] in kept for part in doc.values())]


def train_judge(out: Path, steps: int = JUDGE_STEPS, seed: int = 0, report: bool = True) -> list[float]:
    """Train the judge into out/judge; its losses, in nats."""
    torch.manual_seed(seed)
    labels = (*corpus.EMOTIONS, corpus.NEUTRAL)
    rng = random.Random(seed + 10_000)
    texts = [corpus.judged(rng) for _ in range(JUDGE_BATCH * 1000)]
    model, words = families.judge((" " + w for w in corpus.vocabulary()), labels)
    rows = [(words(text)["input_ids"], labels.index(label)) for text, label in texts]
    source = batches(rows, JUDGE_BATCH, random.Random(seed), length=lambda row: len(row[0]))

    def loss_of(step: int) -> torch.Tensor:
        batch = next(source)
        ids, mask = padded([row for row, _ in batch], words.pad_token_id)
        return model(input_ids=ids, attention_mask=mask.long(), labels=torch.tensor([y for _, y in batch])).loss

    losses = descend(model, steps, JUDGE_RATE, loss_of, "judge" if report else "")
    write(out / "judge", model, words)
    return losses


def write(folder: Path, model: Any, words: Any) -> None:
    """An ordinary model folder in float16, put in place in one move."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.eval().half().save_pretrained(fresh)
    words.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def write_texts(path: Path) -> None:
    """The held-out text set as YAML; JSON scalars are YAML scalars."""
    lines = ["# Made by `python bench/zoo_train.py texts`; no passage here is in the training set."]
    for key, value in corpus.text_set().items():
        if isinstance(value, str):
            lines.append(f"{key}: {value}")
        elif isinstance(value, list):
            lines += [f"{key}:", *(f"  - {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}:")
            for label, inner in value.items():
                lines += _yaml_entry(label, inner)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _yaml_entry(label: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [f"  {label}: {value}"]
    if isinstance(value, list):
        return [f"  {label}:", *(f"    - {json.dumps(item)}" for item in value)]
    return [f"  {label}:", *(f"    {key}: {json.dumps(item)}" for key, item in value.items())]


def main() -> None:
    """Command line."""
    here = path(FAMILIES[0]).parent
    parser = argparse.ArgumentParser(prog="python bench/zoo_train.py", description=__doc__)
    parser.add_argument("what", nargs="*", default=["all"], choices=[*names(), "texts", "all"])
    parser.add_argument("--steps", type=int, help=f"one round of so many; default {ROUNDS}, judge {JUDGE_STEPS}")
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    wanted = [*names(), "texts"] if "all" in given.what else given.what
    for what in wanted:
        if what in FAMILIES:
            train_family(what, given.out, given.steps, given.seed)
        elif what == "judge":
            train_judge(given.out, given.steps or JUDGE_STEPS, given.seed)
        else:
            write_texts(text_sets.HERE / "zoo.yaml" if given.out == here else given.out / "zoo.yaml")


if __name__ == "__main__":
    main()
