"""Damages files of vectors in every way that a seed gives, and says what reading them does: a child of its tests.

python damaging.py FOLDER SEED COUNT      reads COUNT damaged copies of FOLDER's files under a limit of memory
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

SECONDS, MEMORY = 20, 3 * 2**29
"""Of one file; above what the imports take, in bytes."""

HUGE = (2**63 - 1, 2**64 - 1, 2**62, 2**40, 2**33, 2**32 - 1, 2**31, 2**24, 0)


class Trap:
    """What makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def flips(data: bytes, pick: random.Random) -> bytes:
    buffer = bytearray(data)
    reach = len(buffer) if pick.random() < 0.5 else min(len(buffer), 512)
    for _ in range(pick.randint(1, 20)):
        buffer[pick.randrange(reach)] ^= 1 << pick.randrange(8)
    return bytes(buffer)


def cut(data: bytes, pick: random.Random) -> bytes:
    return data[: pick.randrange(len(data) or 1)]


def inflated(data: bytes, pick: random.Random) -> bytes:
    """A length or a count of four or eight bytes is another one."""
    buffer, form = bytearray(data), pick.choice(["<Q", "<I"])
    size = struct.calcsize(form)
    if len(buffer) <= size:
        return cut(data, pick)
    ends = [pick.randrange(min(512, len(buffer) - size)), pick.randrange(max(0, len(buffer) - 512), len(buffer) - size)]
    at = pick.choice(ends)
    buffer[at : at + size] = struct.pack(form, pick.choice(HUGE) % (1 << 8 * size))
    return bytes(buffer)


def numbered(data: bytes, pick: random.Random) -> bytes:
    """A number written in figures is another one."""
    places = list(re.finditer(rb"[0-9]+", data[:4096]))
    if not places:
        return flips(data, pick)
    number = pick.choice(places)
    value = pick.choice([b"9" * pick.randint(1, 5000), b"-1", b"1e999", b"0", b"18446744073709551616", b"NaN", b"null"])
    return data[: number.start()] + value + data[number.end() :]


def swapped(data: bytes, pick: random.Random) -> bytes:
    other = pick.choice(SEEDS)[1]
    size = pick.choice([4, 8, 24, 64, 256])
    return other[:size] + data[size:]


def doubled(data: bytes, pick: random.Random) -> bytes:
    first, last = sorted(pick.randrange(len(data)) for _ in range(2))
    return data[:last] + data[first:last] * pick.randint(1, 3) + data[last:]


def nested(data: bytes, pick: random.Random) -> bytes:
    """JSON within JSON, its length as it should be."""
    depth = pick.choice([10, 1000, 100_000])
    bomb = pick.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth])
    bomb = pick.choice([bomb, b'{"__metadata__":' + bomb + b"}", b'{"kind":"direction","tensors":' + bomb])
    if data[:1] == b"{":
        return bomb
    return struct.pack("<Q", len(bomb)) + bomb + data[-512:]


def counted(data: bytes, pick: random.Random) -> bytes:
    """GGUF of lists that declare huge counts of what takes no room at the end of a file."""
    kind = pick.choice([0, 4, 7, 8, 9, 10, 12, 99])
    name = b"general.list"
    list_of = struct.pack("<I", 9) + struct.pack("<IQ", kind, pick.choice(HUGE))
    return (
        b"GGUF"
        + struct.pack("<IQQQ", 3, pick.choice([0, 1, 2**40]), pick.choice([1, 2**40]), len(name))
        + name
        + list_of
    )


def rezipped(data: bytes, pick: random.Random) -> bytes:
    """A member of an archive is damaged, its checksum made again."""
    if not data.startswith(b"PK"):
        return flips(data, pick)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {member.filename: archive.read(member) for member in archive.infolist()}
    names = [name for name in entries if entries[name]]
    name = pick.choice([*names, *[member for member in names if member.endswith((".pkl", ".npy"))] * 3])
    change = pick.choice([flips, cut, inflated, numbered, doubled, planted, zeros])
    entries[name] = change(entries[name], pick)
    return zipped(entries, pick.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))


def zipped(entries: dict[str, bytes], compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def planted(data: bytes, pick: random.Random) -> bytes:
    """A pickle that makes a folder, alone or before what was there."""
    trap = pickle.dumps(Trap(), protocol=pick.choice([0, 1, 2, 4]))
    return pick.choice([trap, trap[:-1] + data, data[:-1] + trap])


def zeros(data: bytes, pick: random.Random) -> bytes:
    """Much that shrinks to nothing."""
    return data[:128] + bytes(pick.choice([2**20, 2**26]))


CHANGES: list[Callable[[bytes, random.Random], bytes]] = [flips, cut, inflated, numbered, swapped, doubled, nested]
CHANGES += [counted, rezipped, rezipped, rezipped, planted]
SEEDS: list[tuple[str, bytes]] = []


def outcome(path: Path) -> str:
    """`read`, `refused`, or what went wrong."""
    from nsteer.errors import ExchangeError
    from nsteer.vectors.exchange.arriving import _named, read
    from nsteer.vectors.exchange.assigning import Said, assign

    try:
        contents = read(path)
        vectors, *_ = assign(path, contents, Said(layers_are="block-index", method="m"), 6, 96)
        _named(vectors, "m", None, path)
        json.dumps(contents.about)
    except ExchangeError as error:
        text = str(error)
        return "refused" if len(text) < 1500 and text.count("\n") == 0 else f"long: {text[:300]!r}"
    except Late:
        return "hang"
    except BaseException:
        return traceback.format_exc(limit=-6)
    return "read"


class Late(BaseException):
    """What nothing that reads takes for an error of its own."""


def late(signum: int, frame: object) -> None:
    raise Late


def limit(memory: int = MEMORY) -> None:
    """No more addresses than now and `memory`; an alarm raises Late."""
    taken = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most memory that was held since `forget_peak`, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main(folder: Path, seed: int, count: int) -> None:
    import torch
    import torch._weights_only_unpickler  # noqa: F401

    import nsteer.vectors.exchange  # noqa: F401

    SEEDS.extend((file.suffix, file.read_bytes()) for file in sorted(folder.iterdir()) if file.is_file())
    os.chdir(folder.parent)
    limit()
    pick, counts, bad = random.Random(seed), {"read": 0, "refused": 0}, []
    for k in range(count):
        ending, data = SEEDS[k % len(SEEDS)]
        change = pick.choice(CHANGES)
        content = change(data, pick)
        file = folder.parent / f"damaged-{seed}{ending}"
        file.write_bytes(content)
        signal.alarm(SECONDS)
        said = outcome(file)
        signal.alarm(0)
        if said in counts:
            counts[said] += 1
        else:
            bad.append([ending, change.__name__, k, said])
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the pytest process that started this one
    memory = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({**counts, "bad": bad, "memory": memory, "sprung": Path("sprung").exists()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
