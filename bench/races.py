"""Runs, gc, repair, derive and merge at once on one store, signalled at random: python bench/races.py --minutes 30

Two or three commands are started at random moments on one store: runs of plans that overlap and differ in a knob, `gc
--delete`, `verify --repair`, `derive`, `merge`. They are stopped and continued (SIGSTOP, SIGCONT), interrupted (SIGINT)
and killed (SIGKILL) at random. Then every committed cell is compared with the cell of the same fingerprint of a store
that a plan filled alone, every cell whose commit had returned must be there unless a command rightly took or replaced
it, and `nsteer verify` must find nothing. Now and then one plan is run alone and must bring the store to its reference.

Commands are forked from a parent that has everything imported and nothing open, so signals fall into the work.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from nsteer import cli, zoo
from nsteer.errors import NsteerError
from nsteer.executors.classifier import Classifier
from nsteer.executors.local import Local
from nsteer.plan.check import load
from nsteer.store import Store
from nsteer.upkeep.stored import StoredCell, committed_cells
from nsteer.upkeep.verify import verify
from nsteer.upkeep.wanted import wanted_cells

BASE = """
name: races
models: [zoo/llama]
texts: zoo
emotions: [happy, sad, afraid]
methods:
  generation: {source: generation, samples: 4, generate: {max_new_tokens: 8}, pooling: mean, baseline: grand_mean}
steer:
  layers: {each: [3, 1]}
  strengths: [0.1, 0.2]
  prompts: {market: tom walked to the market and, rain: the rain fell}
  generate: {max_new_tokens: 8}
judge: zoo/judge
threads: 1
store: reference.zarr
"""

PLANS = {
    "base": {},
    "short": {"methods.generation.generate.max_new_tokens": "6"},
    "steps": {"steer.generate.max_new_tokens": "5"},
    "wide": {"emotions": "[happy, sad, afraid, angry]"},
    "neutral": {"methods.generation.baseline": "neutral_mean"},
    "strong": {"steer.strengths": "[0.2, 0.3]"},
}
"""Each differs from `base` in one knob."""

RECORDS = ("runs", "models", "programs", "failures", "claims", "summary", "imports")
"""Groups whose cells tell of the commands themselves: two runs may rightly differ in them."""

OFTEN, SELDOM = 0.006, 0.0008
"""Chance of a signal to a command each 20 ms: about one in three seconds; on object storage a run takes minutes."""

LIMIT = 400
"""Seconds that a trial may take."""

TRIALS = 5
"""Trials of one store: one that only grows would be checked for ever."""

Cell = tuple[str, tuple]


def settings(plan: str, store: str) -> list[str]:
    pairs = {**PLANS[plan], "store": store}
    return [part for path, value in pairs.items() for part in ("--set", f"{path}={value}")]


def write_plan(folder: Path, plan: str, store: str) -> Path:
    """The plan as a file of its own, for commands that take no `--set`."""
    import yaml

    document = yaml.safe_load(BASE)
    for path, value in {**PLANS[plan], "store": f'"{store}"'}.items():
        *way, last = path.split(".")
        at = document
        for part in way:
            at = at[part]
        at[last] = yaml.safe_load(value)
    file = folder / f"{plan}.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


# ---- what is compared ---------------------------------------------------------------------------------------------


def cells_of(store: Store) -> Iterator[tuple[Cell, StoredCell]]:
    for path in store.groups():
        if path.split("/")[0] not in RECORDS:
            for key, cell in committed_cells(store, path):
                yield (path, key), cell


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal values: floats to the rounding that another batch brings, the number of padding tokens aside."""
    if a.keys() != b.keys():
        return False
    for name, left in a.items():
        right = b[name]
        if name == "program":
            continue
        if name == "token_id":
            left, right = (
                np.array([str([t for t in row if t >= 0]) for row in array.reshape(-1, array.shape[-1]).tolist()])
                for array in (left, right)
            )
        if left.shape != right.shape:
            return False
        if left.dtype.kind == "f":
            if not np.allclose(left, right, rtol=1e-2, atol=1e-3, equal_nan=True):
                return False
        elif left.tolist() != right.tolist():
            return False
    return True


References = dict[tuple[str, tuple, int], dict[str, np.ndarray]]


def references(folder: Path) -> References:
    """Values of every cell of every plan, each plan run alone into a store of its own."""
    truths: References = {}
    for plan in PLANS:
        store = folder / f"ref-{plan}.zarr"
        code = ended(forked(lambda p=plan, s=store: command(["run", write_plan(folder, p, str(s)), "--quiet"])))
        if code:
            raise SystemExit(f"the reference of {plan} did not come about: exit {code}")
        for (path, key), cell in cells_of(Store(store)):
            truths[path, key, cell.record.fingerprint] = cell.values()
    return truths


# ---- commands, and what they note -----------------------------------------------------------------------------------


def command(arguments: list[Any]) -> int:
    """One nsteer command in this process; its exit code."""
    try:
        cli.main([str(argument) for argument in arguments], standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def noting(log: Path, actor: str) -> None:
    """Has every commit of this process noted in a file, before it begins and once it returned."""
    from nsteer.runner import runs

    for name, value in (("WAVE", 4), ("POLL", 0.05)):
        setattr(runs, name, value)  # many small waves: many moments at which two commands may meet
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    commit, drop_at = Store.commit, Store.drop_at

    def note(event: str, path: str, cell: tuple, number: int) -> None:
        line = json.dumps([time.monotonic_ns(), actor, event, path, list(cell), number])
        os.write(descriptor, line.encode() + b"\n")

    def committing(self: Store, path: str, cell: tuple, data: Any, *, fingerprint: int, **rest: Any) -> Any:
        note("begin", path, cell, fingerprint)
        result = commit(self, path, cell, data, fingerprint=fingerprint, **rest)
        note("done", path, cell, fingerprint)
        return result

    def dropping(self: Store, path: str, position: tuple, *rest: Any, **more: Any) -> Any:
        leaf = self.leaf(path)
        note("drop", path, leaf.cell_labels(position) if leaf else (), 0)
        return drop_at(self, path, position, *rest, **more)

    Store.commit, Store.drop_at = committing, dropping  # type: ignore[method-assign]


def forked(action: Callable[[], Any], output: Path | None = None) -> int:
    """The process id of a fork that does something and ends with its exit code."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        target = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        warnings.simplefilter("ignore")
        code = int(action() or 0)
    except KeyboardInterrupt:  # before the command began
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass
class Actor:
    """One command of a trial."""

    name: str
    kind: str
    plan: str
    process: int = 0
    code: int | None = None
    killed: bool = False
    signals: list[str] = field(default_factory=list)

    @property
    def lives(self) -> bool:
        if self.code is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None


@dataclass
class Ground:
    """Where trials take place: the folder, the store, its references, and how the dice fall."""

    folder: Path
    store: str
    references: References
    studies: dict[str, Any]
    chance: random.Random
    often: float
    """Chance of a signal to a command each 20 ms."""


def object_storage(folder: Path, share: float, seed: int) -> int:
    """Starts an S3 server on loopback behind a proxy that fails; the environment names it. Its process id."""
    told = folder / "endpoint"
    keys = {"AWS_ACCESS_KEY_ID": "loopback", "AWS_SECRET_ACCESS_KEY": "loopback", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys)

    def serve() -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        import boto3
        from faulty_proxy import FaultyProxy
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="races")
        with FaultyProxy(f"http://{host}:{port}", share, seed=seed) as proxy:
            told.with_suffix(".new").write_text(proxy.url)
            told.with_suffix(".new").rename(told)
            while True:
                time.sleep(3600)

    process = forked(serve, folder / "server.out")
    while not told.exists():
        time.sleep(0.1)
    os.environ["AWS_ENDPOINT_URL"] = told.read_text()
    return process


def arguments(ground: Ground, kind: str, plan: str) -> list[Any]:
    file = write_plan(ground.folder, plan, ground.store)
    return {
        "run": ["run", file, "--quiet", "--json"],
        "gc": ["gc", ground.store, file, "--delete"],
        "repair": ["verify", ground.store, "--repair"],
        "verify": ["verify", ground.store],
        "derive": ["derive", file, "--quiet"],
        "report": ["report", ground.store],
        "merge": ["merge", ground.folder.parent / f"ref-{plan}.zarr", "-o", ground.store],
    }[kind]


def trial(ground: Ground, log: Path, counts: Counter) -> list[Actor]:
    """Starts two or three commands, signals them at random, and waits for all."""
    chance = ground.chance
    alike = chance.random() < 0.4  # of one plan: then nothing may be lost for another's sake
    plan = chance.choice(list(PLANS))
    kinds = ["run", chance.choice(["run", "run", "gc", "gc", "repair", "derive", "merge", "verify"])]
    if chance.random() < 0.4:
        kinds.append(chance.choice(["run", "gc", "repair", "derive", "merge", "report"]))
    actors = [
        Actor(f"{n}-{kind}", kind, plan if alike or n == 0 else chance.choice(list(PLANS)))
        for n, kind in enumerate(kinds)
    ]
    starts = sorted((chance.uniform(0, 3.0) if n else 0.0, n) for n in range(len(actors)))
    begun = time.monotonic()
    waiting, stopped = list(starts), dict[str, float]()
    while waiting or any(actor.lives for actor in actors if actor.process):
        now = time.monotonic() - begun
        while waiting and waiting[0][0] <= now:
            actor = actors[waiting.pop(0)[1]]
            asked = arguments(ground, actor.kind, actor.plan)

            def act(actor: Actor = actor, asked: list[Any] = asked) -> int:
                noting(log, actor.name)
                return command(asked)

            actor.process = forked(act, ground.folder / f"{actor.name}.out")
        for actor in actors:
            if not actor.process or not actor.lives:
                continue
            if actor.name in stopped:
                if now >= stopped[actor.name]:
                    os.kill(actor.process, signal.SIGCONT)
                    del stopped[actor.name]
            elif chance.random() < ground.often:
                which = chance.choice(["STOP"] * 6 + ["INT", "KILL"])
                actor.signals.append(which)
                counts[f"SIG{which}"] += 1
                actor.killed |= which == "KILL"
                if which == "STOP":
                    stopped[actor.name] = now + chance.uniform(0.1, 3.0)
                os.kill(actor.process, getattr(signal, f"SIG{which}"))
        if now > LIMIT:
            for actor in actors:
                if actor.process and actor.lives:
                    counts["hangs"] += 1
                    actor.killed = True
                    os.kill(actor.process, signal.SIGKILL)
        time.sleep(0.02)
    for actor in actors:
        counts[actor.kind] += 1
        told = (ground.folder / f"{actor.name}.out").read_text(errors="replace")
        if "Traceback (most recent call last)" in told:
            counts["tracebacks"] += 1
            print(f"{actor}: {told[-1500:]}", file=sys.stderr)
    return actors


def apart(action: Callable[[Counter], None], counts: Counter, file: Path) -> None:
    """Has something counted in a fork: the parent opens nothing."""

    def counting() -> int:
        mine = Counter[str]()
        try:
            action(mine)
        except Exception:
            traceback.print_exc()
            mine["check_failed"] += 1
        file.write_text(json.dumps(mine))
        return 0

    told = file.with_suffix(".out")
    if ended(forked(counting, told)):
        counts["check_failed"] += 1
    else:
        counts.update(json.loads(file.read_text()))
    sys.stderr.write(told.read_text(errors="replace"))


def after(ground: Ground, log: Path, actors: list[Actor], counts: Counter) -> None:
    """Compares what the store now holds with the references and with what was noted."""
    store, present = Store(ground.store), dict[Cell, int]()
    if not store.exists:
        counts["nothing"] += 1
        return
    for (path, key), cell in cells_of(store):
        number = present[path, key] = cell.record.fingerprint
        counts["cells"] += 1
        truth = ground.references.get((path, key, number))
        if truth is None:
            counts["unknown"] += 1
            print(f"no plan makes {path} {key} under {number}; {actors}", file=sys.stderr)
            continue
        try:
            fine = same(cell.values(), truth)
        except NsteerError as error:
            fine = False
            print(error, file=sys.stderr)
        if not fine:
            counts["wrong"] += 1
            if counts["wrong"] <= 3:
                print(f"wrong: {path} {key}; {actors}", file=sys.stderr)
    notes = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    events: dict[Cell, list[list]] = {}
    for _, actor, event, path, key, number in sorted(notes):
        events.setdefault((path, tuple(key)), []).append([actor, event, number])
    collectors = [actor.plan for actor in actors if actor.kind == "gc"]
    kept_by = {plan: wanted_cells([ground.studies[plan]], Store(ground.store)) for plan in collectors}
    for (path, key), told in events.items():
        acknowledged = [number for _, event, number in told if event == "done"]
        if path.split("/")[0] in RECORDS or not acknowledged:
            continue
        counts["acknowledged"] += 1
        if (path, key) in present:
            if present[path, key] not in acknowledged:
                counts["foreign"] += 1
                print(f"{path} {key} holds what nobody committed: {told}; {actors}", file=sys.stderr)
            continue
        begun = Counter((actor, number) for actor, event, number in told if event == "begin")
        begun.subtract((actor, number) for actor, event, number in told if event == "done")
        cut_off = any(count > 0 for count in begun.values())
        collected = any(acknowledged[-1] not in kept.get(path, {}).get(key, ()) for kept in kept_by.values())
        dropped = told[-1][1] == "drop"
        if not (cut_off or collected or (dropped and len({actor.plan for actor in actors}) > 1)):
            counts["lost"] += 1
            print(f"lost: {path} {key}: {told}; {actors}", file=sys.stderr)
    report = verify(store)
    counts["findings"] += len(report.findings)
    for finding in report.findings[:5]:
        print(f"verify: {finding}; {actors}", file=sys.stderr)


def recover(ground: Ground, counts: Counter) -> None:
    """One plan alone brings the store to its reference, whatever happened before."""
    plan = ground.chance.choice(list(PLANS))
    output = ground.folder / "recover.out"
    code = ended(forked(lambda: command(arguments(ground, "run", plan)), output))
    store = Store(ground.store)
    needed = wanted_cells([ground.studies[plan]], store)
    missing = [
        (path, key)
        for (path, key, number) in ground.references
        if number in needed.get(path, {}).get(key, ()) and store.missing(path, {key: number})
    ]
    counts["recoveries"] += 1
    if code or missing:
        counts["not_recovered"] += 1
        print(f"{plan} alone: exit {code}, missing {missing[:5]}: {output.read_text()[-1500:]}", file=sys.stderr)


BAD = ("wrong", "lost", "unknown", "foreign", "findings", "tracebacks", "hangs", "not_recovered", "check_failed")


def rounds(ground: Ground, first: int, counts: Counter) -> bool:
    """The trials of one store; whether all went well."""
    for number in range(first, first + TRIALS):
        log, mine = ground.folder / f"{number}.log", Counter[str]()
        actors = trial(ground, log, mine)

        def compare(tally: Counter, log: Path = log, actors: list[Actor] = actors) -> None:
            after(ground, log, actors, tally)

        apart(compare, mine, ground.folder / "after.json")
        if number % 3 == 2:
            apart(lambda tally: recover(ground, tally), mine, ground.folder / "recover.json")
        mine["trials"] += 1
        counts.update(mine)
        if any(mine[name] for name in BAD):
            print(f"trial {number}: {dict(mine)}; kept for a look: {ground.folder}", file=sys.stderr, flush=True)
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--stores", type=int, default=10**6, help=f"stop after so many of {TRIALS} trials, if sooner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true", help="the stores lie on an S3 server on loopback that fails")
    parser.add_argument("--share", type=float, default=0.05, help="of the requests to that server which fail")
    parser.add_argument("--folder", default=None, help="where things lie; a temporary folder unless given")
    given = parser.parse_args()
    for module in ("runner", "report.reporting", "upkeep.gc", "upkeep.merge"):
        importlib.import_module(f"nsteer.{module}")  # once here, not in every fork
    Local(str(zoo.path("llama")), device="cpu")  # and what transformers imports with the first model of a kind
    Classifier(str(zoo.path("judge")), device="cpu")
    gc.collect()
    gc.freeze()
    folder = Path(tempfile.mkdtemp(prefix="races-", dir=given.folder)).resolve()
    os.chdir(folder)
    truth = references(folder)
    studies = {plan: load(write_plan(folder, plan, str(folder / "x.zarr"))) for plan in PLANS}
    server = object_storage(folder, given.share, given.seed) if given.s3 else 0
    chance, begun, counts = random.Random(given.seed), time.monotonic(), Counter[str]()
    for number in range(given.stores):
        if time.monotonic() - begun > 60 * given.minutes:
            break
        here = folder / f"s{number}"
        here.mkdir()
        store = f"s3://races/s{given.seed}-{number}.zarr" if given.s3 else str(here / "s.zarr")
        ground = Ground(here, store, truth, studies, chance, SELDOM if given.s3 else OFTEN)
        if rounds(ground, number * TRIALS, counts):
            shutil.rmtree(here)
    if server:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    bad = {name: counts[name] for name in BAD}
    proved = counts["cells"] and counts["acknowledged"]
    print(json.dumps({**counts, **bad, "seconds": round(time.monotonic() - begun)}), flush=True)
    if not any(bad.values()):
        os.chdir("..")
        shutil.rmtree(folder)
    return 1 if any(bad.values()) or not proved else 0


if __name__ == "__main__":
    sys.exit(main())
