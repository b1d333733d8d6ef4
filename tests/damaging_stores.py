"""Damages a store in every way that a seed gives, and says what reading it does: a child of its tests.

python damaging_stores.py STORE SEED COUNT PLAN few|all      reads COUNT damaged copies of STORE under a limit of
                                                             memory; `all`: by every command, PLAN into one of ten
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damaging
from damaging import HUGE, Late, cut, flips, inflated, numbered, planted, zeros

PICKLE = {"id": "pickle"}
WRONG: list[Any] = [None, True, False, "", "x", "../..", "\x1b[2J", -1, 1.5, 1e308, *HUGE, [], [[]], {}, {"a": {}}]
WRONG += [float("nan"), [1] * 40, ["x"] * 3, "x" * 100_000, [None], {"name": "x"}, [3, 2], [2**20] * 6]
DOCUMENTS = "zarr.json"
KEYS = ["zarr_format", "shape", "data_type", "chunk_grid", "codecs", "fill_value", "dimension_names", "attributes"]
KEYS += ["node_type", "chunk_key_encoding", "consolidated_metadata", "storage_transformers", "filters"]


def files(store: Path, ending: str = "") -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file() and path.name.endswith(ending))


def put(file: Path, content: bytes) -> None:
    """Another file in its place: the old one is shared with the other copies."""
    file.unlink()
    file.write_bytes(content)


def places(document: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a document."""
    yield path
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, child in inner:
        yield from places(child, (*path, key))


def held(document: Any, path: tuple) -> Any:
    for key in path:
        document = document[key]
    return document


def nested(pick: random.Random) -> Any:
    """Lists within lists."""
    lists: Any = []
    for _ in range(pick.choice([5, 20, 300])):
        lists = [lists]
    return lists


def another(old: Any, document: Any, pick: random.Random) -> Any:
    """Something else than what stands at a place."""
    every = list(places(document))
    if type(old) is int and pick.random() < 0.5:
        return pick.choice([old + 1, old - 1, old * 1000, *HUGE])
    if isinstance(old, list) and old and pick.random() < 0.5:
        return pick.choice([old * 2, old[:-1], old[::-1], [another(child, document, pick) for child in old]])
    if isinstance(old, dict) and old and pick.random() < 0.5:
        gone = pick.choice(sorted(old))
        return pick.choice([{key: child for key, child in old.items() if key != gone}, {**old, "more": 1}])
    return pick.choice([pick.choice(WRONG), nested(pick), json.loads(json.dumps(held(document, pick.choice(every))))])


def changed(document: Any, pick: random.Random) -> Any:
    """A document of which one place holds something else."""
    every = [path for path in places(document) if path]
    if not every:
        return pick.choice(WRONG)
    if pick.random() < 0.5:  # those that zarr obeys
        every = [path for path in every if path[-1] in KEYS or str(path[-1]).startswith("nsteer")] or every
    path = pick.choice(every)
    held(document, path[:-1])[path[-1]] = another(held(document, path), document, pick)
    return document


def one_document(store: Path, pick: random.Random) -> None:
    file = pick.choice(files(store, DOCUMENTS))
    document = json.loads(file.read_text())
    for _ in range(pick.choice([1, 1, 3])):
        document = changed(document, pick)
    put(file, json.dumps(document).encode())


def broken_text(store: Path, pick: random.Random) -> None:
    """A document that is none: cut, flipped, its figures others, nested too deep."""
    file = pick.choice(files(store, DOCUMENTS))
    deep = [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"attributes":' * 2000 + b"1" + b"}" * 2000,
        b"",
        b"\xff\xfe",
        b"null",
    ]
    change = pick.choice([flips, cut, numbered, numbered, lambda data, pick: pick.choice(deep)])
    put(file, change(file.read_bytes(), pick))


def published(store: Path, group: str, change: Callable[[dict, dict], None]) -> None:
    """Changes what is told of a group wherever it is published: in the root, by itself, by its arrays.

    change : of the attributes of the group and the documents of its arrays, in place
    """
    root, own = (json.loads((store / name).read_text()) for name in (DOCUMENTS, f"{group}/{DOCUMENTS}"))
    arrays = own["consolidated_metadata"]["metadata"]
    change(own["attributes"], arrays)
    members = root["consolidated_metadata"]["metadata"]
    members[group]["attributes"] = own["attributes"]
    for name, document in arrays.items():
        members[f"{group}/{name}"] = document
        if (store / group / name / DOCUMENTS).exists():
            put(store / group / name / DOCUMENTS, json.dumps(document).encode())
    put(store / DOCUMENTS, json.dumps(root).encode())
    put(store / group / DOCUMENTS, json.dumps(own).encode())


def picked(names: list[str], pick: random.Random) -> list[str]:
    return pick.sample(sorted(names), min(len(names), pick.randint(1, 4)))


def groups(store: Path) -> list[str]:
    members = json.loads((store / DOCUMENTS).read_text())["consolidated_metadata"]["metadata"]
    return sorted(path for path, member in members.items() if "nsteer_cell" in member.get("attributes", {}))


def told_alike(store: Path, pick: random.Random) -> None:
    """One thing is told otherwise, and alike wherever it is told."""

    def change(attrs: dict, arrays: dict) -> None:
        if pick.random() < 0.3:
            changed(attrs, pick)
        else:
            changed(arrays[pick.choice(sorted(arrays))], pick)

    published(store, pick.choice(groups(store)), change)


def grown(store: Path, pick: random.Random) -> None:
    """Axes are longer than their files, wherever that is told; often several, and their structures too."""

    def change(attrs: dict, arrays: dict) -> None:
        dims = sorted(name for name, array in arrays.items() if array["dimension_names"] == [name])
        some = {dim: pick.choice([7, 300, 4096, 65_536, 10**6, 2**31]) for dim in picked(dims, pick)}
        for array in arrays.values():
            array["shape"] = [some.get(d, n) for d, n in zip(array["dimension_names"], array["shape"], strict=True)]
            if pick.random() < 0.2:
                array["chunk_grid"]["configuration"]["chunk_shape"] = array["shape"]
        for structure in attrs["nsteer_structures"]:
            if pick.random() < 0.5:
                structure["sizes"] |= {dim: n for dim, n in some.items() if dim in structure["sizes"]}

    published(store, pick.choice(groups(store)), change)


def really_grown(store: Path, pick: random.Random) -> None:
    """Axes that are longer with all that belongs to them: labels, their numbers, structures; only the data are not
    there."""
    import numpy as np
    import zarr

    from nsteer.store.bound import labels_number

    def change(attrs: dict, arrays: dict) -> None:
        dims = [name for name, array in arrays.items() if array["dimension_names"] == [name]]
        dims = [dim for dim in dims if dim != "cell_field" and not dim.endswith("_chunk")]
        for dim in picked(dims, pick):
            size, kind = pick.choice([50, 400, 4096, 20_000]), arrays[dim]["data_type"]
            labels: Any = [f"l{k}" for k in range(size)] if kind == "string" else list(range(size))
            labels = [float(label) for label in labels] if kind == "float64" else labels
            attrs["nsteer_labels"][dim] = labels_number(labels)
            for array in arrays.values():
                array["shape"] = [
                    size if d == dim else n for d, n in zip(array["dimension_names"], array["shape"], strict=True)
                ]
                array["shape"] = [
                    -(-size // attrs["nsteer_chunks"][dim]) if d == f"{dim}_chunk" else n
                    for d, n in zip(array["dimension_names"], array["shape"], strict=True)
                ]
            for structure in attrs["nsteer_structures"]:
                structure["sizes"] |= {dim: size} if dim in structure["sizes"] else {}
            folder = store / group / dim
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / DOCUMENTS).write_text(json.dumps(arrays[dim]))
            text = np.dtypes.StringDType() if kind == "string" else None
            zarr.open_array(folder, mode="r+")[:] = np.array(labels, dtype=text)

    group = pick.choice(groups(store))
    published(store, group, change)


def foreign_codecs(store: Path, pick: random.Random) -> None:
    """Codecs, filters and formats that nsteer does not write, beside chunks that are pickles."""

    def change(attrs: dict, arrays: dict) -> None:
        name = pick.choice(sorted(arrays))
        array, other = arrays[name], arrays[pick.choice(sorted(arrays))]
        ways: list[dict] = [
            {"zarr_format": 2, "filters": [{"id": "vlen-utf8"}, PICKLE], "dtype": "|O", "chunks": [1]},
            {"zarr_format": 2, "filters": [PICKLE], "compressor": PICKLE, "dtype": "|O", "order": "C"},
            {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
            {"codecs": [*array["codecs"], PICKLE]},
            {
                "codecs": [
                    {"name": "sharding_indexed", "configuration": {"chunk_shape": [1], "codecs": array["codecs"]}}
                ]
            },
            {"codecs": other["codecs"]},
            {"data_type": other["data_type"]},
            {"codecs": other["codecs"], "data_type": other["data_type"], "fill_value": other["fill_value"]},
            {"filters": [PICKLE]},
            {"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}},
        ]
        array |= pick.choice(ways)
        for file in files(store / group / name):
            if file.name != DOCUMENTS:
                put(file, planted(file.read_bytes(), pick))
        (store / group / name / "0").write_bytes(planted(b"", pick))

    group = pick.choice(groups(store))
    published(store, group, change)


def bytes_of(store: Path, pick: random.Random) -> None:
    """Chunks, records and labels are cut, flipped, emptied, of other arrays, pickles."""
    every = [path for path in files(store) if path.name != DOCUMENTS]
    kind = pick.choice(["cell", "label", "any"])
    dims = {f"{group}/{name}" for group in groups(store) for name in dims_of(store, group)}
    if kind != "any":
        every = [
            path
            for path in every
            if (path.parent.name == "cell" if kind == "cell" else str(path.parent.relative_to(store)) in dims)
        ]
    for _ in range(pick.choice([1, 1, 5])):
        file = pick.choice(every)
        other = pick.choice(every).read_bytes()
        ways = [flips, flips, cut, inflated, planted, zeros, lambda d, p: b"", lambda d, p, o=other: o, sealed]
        put(file, pick.choice(ways)(file.read_bytes() or b"x", pick))


def sealed(data: bytes, pick: random.Random) -> bytes:
    """Damaged under a checksum that is right."""
    import google_crc32c

    body = pick.choice([flips, cut, inflated, zeros])(data[:-4] or b"x", pick)
    return body + google_crc32c.value(body).to_bytes(4, "little")


def dims_of(store: Path, group: str) -> list[str]:
    arrays = json.loads((store / group / DOCUMENTS).read_text())["consolidated_metadata"]["metadata"]
    return [name for name, array in arrays.items() if array["dimension_names"] == [name]]


def no_file(store: Path, pick: random.Random) -> None:
    """Pipes, folders, devices, links to themselves and out of the store, where files should be; or folders gone."""
    file = pick.choice(files(store, pick.choice([DOCUMENTS, ""])))
    if pick.random() < 0.15:
        return shutil.rmtree(file.parent if file.parent != store else pick.choice([*store.iterdir()][:1]), True)
    file.unlink()
    kind = pick.choice(["pipe", "device", "folder", "loop", "out", "socket", "gone", "folder link", "sparse"])
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
        (file / "x").write_bytes(b"x")
    elif kind == "socket":
        os.mknod(file, 0o140644)
    elif kind == "sparse":
        with open(file, "wb") as handle:
            handle.truncate(2**36)
    elif kind != "gone":
        to = {"device": "/dev/zero", "loop": file.name, "out": store.parent / "outside", "folder link": store}[kind]
        file.symlink_to(to)
    return None


def strewn(store: Path, pick: random.Random) -> None:
    """Files that nsteer did not write, under names that look as if."""
    folder = pick.choice(files(store)).parent
    names = [
        "c.0",
        "c.99.0.0",
        "c.-1",
        "c.0.0.0.0.0.0.0.0.0.0.0.0.0",
        "zarr.json",
        "records",
        "c." + "9" * 200,
        "\x1b[2J",
    ]
    for name in pick.sample(names, 3):
        if not (folder / name).exists():
            (folder / name).write_bytes(pick.choice([b"", b"{}", planted(b"", pick), b"\0" * 60]))
    if pick.random() < 0.3:
        (folder / "bytes-\udcff").write_bytes(b"")


def texts(store: Path, pick: random.Random) -> None:
    """Texts that others parse later, a plan or settings as runs and models keep them, are something else, in a cell
    that is whole."""
    import numpy as np
    import xarray as xr

    import nsteer
    from nsteer.store import Store
    from nsteer.store.chunks import cell_name

    group = pick.choice(
        [
            candidate
            for candidate in groups(store)
            if candidate in ("runs", "models", "methods", "ops", "programs", "generations")
        ]
    )
    own, leaf = Store(store), Store(store).leaf(group)
    position, record, _ = pick.choice(list(leaf.records()))
    data = nsteer.open(store)[group].sel(cell_name(leaf, position)).load()
    data = data[[name for name in leaf.variables if name != "cell"]].drop_vars([*leaf.cell], errors="ignore")
    name = pick.choice([variable for variable in data if data[variable].dtype.kind in "TOU"])
    said = [
        "{",
        "[" * 50_000,
        "null",
        "[]",
        '{"steer": 3}',
        "\x1b[2J\x00",
        "x" * 2**20,
        "NaN",
        "1" * 5000,
        "&a [*a]",
        "!!python/name:os.system",
    ]
    data[name] = xr.full_like(data[name], pick.choice(said), dtype=np.dtypes.StringDType())
    own.commit(group, leaf.cell_labels(position), data, fingerprint=record.fingerprint, run=record.run)


CHANGES: list[Callable[[Path, random.Random], None]] = [
    *(one_document, broken_text, told_alike, grown, really_grown, foreign_codecs, bytes_of, no_file, strewn, texts),
    *(one_document, told_alike, told_alike, grown, really_grown, foreign_codecs, bytes_of, bytes_of, no_file),
]
"""Each kind once, then more of those that have most to choose from."""


def loads(store: Path) -> None:
    import nsteer

    opened = nsteer.open(store)
    for path in opened:
        opened[path].load()


def reads(store: Path, whole: Path, plan: str, k: int | None) -> Iterator[tuple[str, Callable[[], None] | list[str]]]:
    """What is done with a damaged store, by name: those that read first, then those that write."""
    yield "ls", ["ls", str(store)]
    yield "verify", ["verify", str(store)]
    yield "load", lambda: loads(store)
    if k is None:
        return
    from nsteer.store import results

    yield "show", ["show", str(store)]
    yield "report", ["report", str(store), "--claims", "-o", str(store.parent / "page.html")]
    more = [
        ("ls --json", ["ls", str(store), "--json"]),
        ("diff", ["diff", str(store), str(whole)]),
        ("export", ["export", str(store), "-o", str(store.parent / "v{layer}.npz")]),
        ("gc", ["gc", str(store), plan, "--delete", "--older-than", "0"]),
        ("merge", ["merge", str(store), str(whole), "-o", str(store.parent / "merged.zarr")]),
        ("merge into", ["merge", str(whole), "-o", str(store)]),
        ("cells", lambda: results.cells(str(store))),
        ("tree", lambda: results.open(store).tree.load()),
    ]
    yield more[(k + k // len(CHANGES)) % len(more)]  # every command meets every damage
    if k % 3 == 0:
        yield "repair", ["verify", str(store), "--repair"]
        yield "verify again", ["verify", str(store)]
    if k % 10 == 0:
        yield "run", ["run", plan, "--set", f"store={store}", "--quiet"]


def outcome(step: Callable[[], None] | list[str]) -> str:
    """`read`, `refused`, or what went wrong."""
    from click.testing import CliRunner

    from nsteer import cli
    from nsteer.errors import NsteerError

    try:
        if callable(step):
            step()
            return "read"
        done = CliRunner().invoke(cli.main, step)
    except NsteerError:
        return "refused"
    except Late:
        return "hang: " + traceback.format_exc(limit=-12)
    except BaseException:
        return traceback.format_exc(limit=-8)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return "".join(traceback.format_exception(done.exception, limit=-8))
    if done.exit_code == 1 and "error: " in done.output and max(map(len, done.output.splitlines())) > 3000:
        return f"long: {done.output[:300]!r}"
    return "read" if done.exit_code == 0 else "refused"


def main(seed_store: Path, seed: int, count: int, plan: str, which: str) -> None:
    import nsteer.executors.local
    import nsteer.report.page
    import nsteer.report.reporting
    import nsteer.runner
    import nsteer.upkeep.verify  # noqa: F401

    folder = Path.cwd()
    counts: dict[str, int] = {"read": 0, "refused": 0}
    (folder / "outside").write_bytes(b"x" * 100)
    if which == "all":  # all that is imported late is imported
        assert outcome(["report", str(seed_store)]) == "read"
        assert outcome(["run", plan, "--set", f"store={folder / 'first.zarr'}", "--quiet"]) == "read"
    gc.collect()
    gc.freeze()  # what is collected after each read is what the read left, not the libraries
    damaging.limit(8 * 2**30)  # each thread of zarr's takes 128 MiB of addresses; what is held is measured below
    bad, peak = [], 0
    for k in range(count):
        pick = random.Random(seed * 100_003 + k)
        change, store = CHANGES[k % len(CHANGES)], folder / f"{seed}-{k}" / "s.zarr"
        shutil.copytree(seed_store, store, copy_function=os.link)
        change(store, pick)
        for name, step in reads(store, seed_store, plan, k if which == "all" else None):
            damaging.forget_peak()
            started = time.monotonic()
            signal.alarm(12 * damaging.SECONDS)  # others may be at work on this machine
            signal.setitimer(signal.ITIMER_PROF, damaging.SECONDS)
            try:
                said = outcome(step)
            except Late:
                said = "hang"
            finally:
                signal.alarm(0)
                signal.setitimer(signal.ITIMER_PROF, 0)
            gc.collect()  # an error that was told may still hold arrays
            memory = damaging.peak()
            peak = max(peak, memory)
            if said in counts and memory > 2 * 2**30:
                said = f"{memory / 2**30:.2f} GiB"
            if said in counts:
                counts[said] += 1
            else:
                took = f"{time.monotonic() - started:.1f} s"
                bad.append([change.__name__, k, name, took, said])
                print(*bad[-1], file=sys.stderr, flush=True)
        if (folder / "sprung").exists() or list(store.parent.rglob("sprung")):
            bad.append([change.__name__, k, "sprung"])
            shutil.rmtree(folder / "sprung", ignore_errors=True)
        shutil.rmtree(store.parent)
    print(json.dumps({**counts, "bad": bad, "memory": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
