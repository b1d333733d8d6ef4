"""Turns what a judge's map says of an emotion into a target: the classes whose scores are to rise, or to fall."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """The classes of a judge by which it is told whether a text moved to an emotion.

    rises, falls : classes whose summed score is to rise, and to fall. An emotion that has a class of its own is that
    class alone, which rises; calm may be told by anger and fear that fall
    """

    rises: tuple[str, ...] = ()
    falls: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return (*self.rises, *self.falls)

    @property
    def own(self) -> str | None:
        """The one class that stands for the emotion; None where several do, or some are to fall."""
        return self.rises[0] if len(self.rises) == 1 and not self.falls else None

    def __str__(self) -> str:
        """The score of the target: `P(joy)`, `-P(anger + fear)`, `P(joy) - P(anger + fear)`."""
        up, down = (f"P({' + '.join(side)})" if side else "" for side in (self.rises, self.falls))
        return f"{up} - {down}" if up and down else up or f"-{down}"


def target_of(given: Any) -> Target | None:
    """A target from what a map gives an emotion: a class, `{rises, falls}` of classes, a Target; None for none."""
    if given is None or isinstance(given, Target):
        return given
    if isinstance(given, str):
        return Target((given,))
    rises, falls = (given.get(side) or () for side in ("rises", "falls"))
    return Target(*((side,) if isinstance(side, str) else tuple(side) for side in (rises, falls)))


def targets_of(
    emotions: Iterable[str], classes: Iterable[str], given: Mapping[str, Any] | None = None
) -> dict[str, Target | None]:
    """Each emotion's target under a judge: what the map gives it, else the class of its own name.

    given : `judge.map` of a plan: emotion -> what `target_of` takes
    None where it has none, or where a class of it is not among the judge's: see `unmapped` for why.
    """
    known, targets = set(map(str, classes)), {}
    for emotion in map(str, emotions):
        wanted = target_of((given or {}).get(emotion, emotion))
        targets[emotion] = wanted if wanted is not None and known.issuperset(wanted.classes) else None
    return targets


def unmapped(emotions: Iterable[str], classes: Iterable[str], given: Mapping[str, Any] | None = None) -> list[str]:
    """A sentence for each emotion that has no target under the judge."""
    known = list(map(str, classes))
    sentences = []
    for emotion, target in targets_of(emotions, known, given).items():
        wanted = target_of((given or {}).get(emotion))
        if target is None and wanted:
            lost = next(name for name in wanted.classes if name not in known)
            sentences.append(f"{emotion}: its class {lost!r} is not among the judge's ({', '.join(known)})")
        elif target is None:
            sentences.append(f"{emotion}: no class of the judge stands for it")
    return sentences


def told_by(targets: Mapping[str, Target | None]) -> list[str]:
    """A sentence for each emotion that is told by more than the rise of one class."""
    return [
        f"{emotion} by the rise of {target}"
        for emotion, target in targets.items()
        if target is not None and not target.own
    ]
