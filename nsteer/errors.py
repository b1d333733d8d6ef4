"""Everything nsteer raises on purpose.

NsteerError
├── PlanError            a plan that can not be run: every problem at once, each located   (exit code 2)
├── ModelError           a model that can not be found, read or loaded                     (exit code 1)
│   └── AnatomyError     a model whose blocks, head or logits can not be found or proved   (exit code 1)
├── ProgramError         a program that can not be compiled                                (exit code 1)
├── ExecutionError       a program that failed while it ran                                (exit code 1)
│   ├── OutOfMemoryError a program that does not fit in memory                         (exit code 1)
│   ├── EditError        an edit that was asked for and changed nothing                    (exit code 1)
│   ├── EngineError      a program that failed in an inference engine, or with it       (exit code 1)
│   ├── SiteError        a site that the current model does not have, or that could not be proved (exit code 1)
│   └── RemoteError      a server that did not give a job's result                         (exit code 1)
│       ├── RemoteAccessError     it refuses the API key, or asks for one
│       ├── RemoteModelError      it does not serve the model
│       ├── RemoteProgramError    the program failed there
│       ├── RemoteTimeoutError    it ended the job: longer than it allows
│       ├── RemoteDeadlineError   we stopped waiting: longer than our own deadline
│       ├── RemoteVersionError    its versions and ours do not fit together
│       ├── RemoteLostError       it can not be reached, or fails again and again
│       └── RemoteCancelError     we were told to stop waiting
├── ExchangeError        a file of vectors that can not be read or written as asked        (exit code 1)
├── BakeError            an edit that no weights hold exactly, or whose proof failed      (exit code 1)
├── SteerError           a vector that can not steer a model as asked                      (exit code 1)
│   └── ArgumentsError   several arguments that do not fit, one a line                     (exit code 1)
├── ClusterError         workers on other machines that can not be had                    (exit code 1)
├── TrapError            a layer to be chosen by a metric that algebra holds fixed there   (exit code 1)
└── StoreError           a store that can not be written or read as asked                  (exit code 1)
    ├── StoreVersionError    a store of another layout
    ├── InputError           a stored cell that can not be computed from
    │   ├── ChangedError     it is gone, or was made with other settings since
    │   └── DamagedError     it does not hold what was committed: a file is lost, cut off, or another's
    ├── RoomError            what takes more memory than there is (is a MemoryError too)
    └── LabelError           a label that the store does not hold (is a KeyError too)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from unicodedata import category


class NsteerError(Exception):
    """The root of all errors raised on purpose. Credentials in an address are masked in its words."""

    def __init__(self, *words: object):
        super().__init__(*(masked(word) if isinstance(word, str) else word for word in words))


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a plan: where it stands, what was found, what was expected, what to try."""

    path: str
    found: str
    expected: str
    hint: str = ""
    file: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: " if self.file else ""
        path = f"{self.path}: " if self.path else ""
        tail = f" ({self.hint})" if self.hint else ""
        return printable(masked(f"{where}{path}expected {self.expected}, found {self.found}{tail}"), lines=False)


class PlanError(NsteerError):
    """A plan that can not be run. `problems` holds every one of them, in file order."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = sorted(problems, key=lambda p: (p.file, p.line, p.column, p.path))
        super().__init__("\n".join(map(str, self.problems)))


class ModelError(NsteerError):
    """A model that can not be found, read or loaded."""


class AnatomyError(ModelError):
    """A model whose residual stream can not be found, or does not behave as a residual stream must."""


class ProgramError(NsteerError):
    """A program that can not be compiled to code."""


class ExecutionError(NsteerError):
    """A program that failed while it ran."""


class OutOfMemoryError(ExecutionError):
    """A program did not fit in memory. With fewer rows it may."""


class EditError(ExecutionError):
    """An edit that was asked for and changed nothing: never a result."""


class EngineError(ExecutionError):
    """A program failed in an inference engine, or with it. Another engine, or executor, may run it."""


class SiteError(ExecutionError):
    """A site of the residual stream that the current model does not have, or that could not be proved."""


class RemoteError(ExecutionError):
    """A server did not give the result of a job."""


class RemoteAccessError(RemoteError):
    """The server refuses the API key, or asks for one. Sending again would not help."""


class RemoteModelError(RemoteError):
    """The server does not serve the model and can not start it."""


class RemoteProgramError(RemoteError):
    """A program failed on the server. `remote` holds the server's own account of it."""

    def __init__(self, message: str, remote: str = ""):
        super().__init__(message)
        self.remote = remote


class RemoteTimeoutError(RemoteError):
    """The server ended a job that ran longer than it allows."""


class RemoteDeadlineError(RemoteError):
    """A job gave no result within the deadline set here."""


class RemoteVersionError(RemoteError):
    """Versions here and on the server do not fit together."""


class RemoteLostError(RemoteError):
    """The server can not be reached, or failed as often as we were ready to try."""


class RemoteCancelError(RemoteError):
    """Waiting for jobs was cancelled here."""


class ExchangeError(NsteerError):
    """A file of vectors that can not be read or written as asked."""


class BakeError(NsteerError):
    """An edit that a model's weights can not hold exactly, or a folder of them that did not pass its proof."""


class SteerError(NsteerError):
    """A vector that can not steer a model as asked."""


class ArgumentsError(SteerError):
    """Several arguments that do not fit, each told in a line."""

    def __init__(self, problems: Iterable[NsteerError]):
        super().__init__("\n".join(printable(problem, lines=False) for problem in problems))


class ClusterError(NsteerError):
    """Workers on other machines, or on this one, can not be had as asked."""


class TrapError(NsteerError):
    """A layer was to be chosen by a metric that algebra holds fixed there."""


class StoreError(NsteerError):
    """A store that can not be written or read as asked."""


class StoreWarning(UserWarning):
    """Something in a store that is passed over, and that somebody should look at."""


class StoreVersionError(StoreError):
    """A store written under another layout than this version of nsteer reads."""


class InputError(StoreError):
    """A cell of a store that can not be computed from: what rests on it fails, and may come right by itself."""


class ChangedError(InputError):
    """A cell that is gone, or was made with other settings since."""


class DamagedError(InputError):
    """A finished cell that does not hold what was committed."""


class RoomError(StoreError, MemoryError):
    """What is asked of a store takes more memory than there is, or than its files could fill."""


class LabelError(StoreError, KeyError):
    """A label that the store does not hold."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


JOINERS = "\u200c\u200d"
"""What some scripts and pictograms need between their letters, though it does not print."""


def printable(text: object, lines: bool = True) -> str:
    """Text in which whatever a terminal, or an eye, would obey is spelled: escape codes and other controls, marks that
    turn the direction of writing, spaces of no width. Every text that is not our own goes through here on its way out.

    lines : whether line ends stay as they are; in a label, a path or a message of one line they are spelled too
    """
    said = str(text)
    if said.isprintable():
        return said
    kept = JOINERS + "\n" * lines
    return "".join(c if c.isprintable() or c in kept or category(c) == "Zs" else ascii(c)[1:-1] for c in said)


USER = re.compile(r"(?<=://)(?:[^\s/@:]{0,200}:\S{0,2000}|[^\s/]{0,2000})@")
"""User and password of an address: up to the last @, since a secret may hold any character."""

SIGNED = re.compile(
    r"([?&;#](?:[^=&\s]{0,100}[-_.])?(?:sig|signature|token|(?:api|secret|account|access|awsaccess)?key(?:id)?|secret|"
    r"pass(?:word|wd)?|credentials?|auth(?:orization)?)=)[^&\s'\"]+",
    re.IGNORECASE,
)
"""What of a query lets others in: signatures, tokens, keys."""


def masked(text: str) -> str:
    """Text in which no address holds a password, a signature or a token."""
    return SIGNED.sub(r"\1…", USER.sub("…@", text)) if "://" in text else text


def did_you_mean(word: object, known: Sequence[str]) -> str:
    """'did you mean x?' where something close is known, else the known words; '' when there are none."""
    if not known:
        return ""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(list(known)[:24])
    return f"known: {shown}{', …' if len(known) > 24 else ''}"


def in_a_line(error: BaseException) -> str:
    """An error of another library: its kind, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'it says no more'}"
