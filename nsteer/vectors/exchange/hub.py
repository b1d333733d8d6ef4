"""Turns vectors of a store into a repository of the Hugging Face Hub, and such a repository into a store's vectors.

    README.md                          the card; its head names the configs
    data/MODEL__METHOD/VARIANT.parquet a row an emotion, `vector` [layers, d_model]
    vectors/MODEL__METHOD.safetensors  the same as `nsteer export` writes it, with where each vector comes from
    plan.yaml, nsteer.json             the plan of the store's last run; what is in here, with SHA-256

The client is huggingface_hub, which finds its own token (HF_TOKEN, or that of its login): nsteer neither asks for one,
nor passes it on, nor keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nsteer import __version__
from nsteer.errors import ExchangeError, masked
from nsteer.store import results, slug
from nsteer.store.results import Results
from nsteer.vectors.exchange import bounded, leaving
from nsteer.vectors.exchange.arriving import Imported, bring_in
from nsteer.vectors.exchange.card import MEANT, card
from nsteer.vectors.exchange.contents import Outgoing
from nsteer.vectors.exchange.leaving import Strength

T = TypeVar("T")
MANIFEST = "nsteer.json"
REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
PREFIX = "hub:"
TYPE: Any = "dataset"
"""Of the repository: its tables are shown on its page."""


@dataclass(frozen=True)
class Pushed:
    """files : names in the repository. folder : where they were written; url, commit : where they went, if they did."""

    files: list[str]
    folder: str = ""
    url: str = ""
    commit: str = ""


def push(
    store: str | os.PathLike,
    repo: str,
    *,
    models: Sequence[str] = (),
    methods: Sequence[str] = (),
    variants: Sequence[str] = ("raw",),
    revision: str | None = None,
    public: bool = False,
    folder: str | os.PathLike | None = None,
) -> Pushed:
    """Puts the vectors of a store, all or those of some models and methods, into a data set on the hub.

    variants : of `card.MEANT`; each is a split of its own
    revision : the branch, made where it is none yet
    public : whether a repository that is made is seen by everybody
    folder : writes the files there and sends nothing
    Raises ExchangeError for what can not be sent, StoreError, InputError.
    """
    if not REPO.fullmatch(repo):
        raise ExchangeError(f"{repo!r}: expected OWNER/NAME of the hub")
    opened = results.open(store)
    chosen = _chosen(opened, models, methods)
    if folder is not None:
        place = Path(folder)
        if place.exists() and any(place.iterdir()):
            raise ExchangeError(f"{place} is not empty: name a folder that is new")
        return Pushed(write(opened, chosen, variants, repo, place), str(place))
    with tempfile.TemporaryDirectory() as temporary:
        files = write(opened, chosen, variants, repo, Path(temporary))
        url, commit = _sent(repo, Path(temporary), revision, public, opened.name)
    return Pushed(files, url=url, commit=commit)


def _chosen(opened: Results, models: Sequence[str], methods: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(model, method, emotions) of every finished vector that is wanted."""
    cells = [cell for path in opened if path.startswith("vectors/") for cell in opened.store.committed(path)]
    emotions_by_pair: dict[tuple[str, str], list[str]] = {}
    for model, method, emotion in cells:
        if (not models or model in models) and (not methods or method in methods):
            emotions_by_pair.setdefault((model, method), []).append(emotion)
    have = {name: sorted({cell[i] for cell in cells}) for i, name in enumerate(("model", "method"))}
    for name, asked in (("model", models), ("method", methods)):
        if lost := [label for label in asked if label not in have[name]]:
            raise ExchangeError(
                f"{opened.name} has no vectors of the {name} {lost[0]!r}; it has {', '.join(have[name])}"
            )
    if not emotions_by_pair:
        raise ExchangeError(f"{opened.name} has no finished vectors")
    return [(*pair, emotions) for pair, emotions in emotions_by_pair.items()]


def write(
    opened: Results, chosen: Sequence[tuple[str, str, list[str]]], variants: Sequence[str], title: str, folder: Path
) -> list[str]:
    """Writes the files of a repository into a folder. Returns their names."""
    if unknown := [variant for variant in variants if variant not in MEANT]:
        raise ExchangeError(f"variant {unknown[0]!r}: expected {', '.join(MEANT)}")
    configs: dict[str, dict[str, Any]] = {}
    for model, method, emotions in chosen:
        name = f"{slug(model)}__{method}"
        (folder / "vectors").mkdir(parents=True, exist_ok=True)
        for variant in dict.fromkeys(variants):
            vectors = leaving.outgoing(opened, model, [method], emotions, None, "", Strength(scale=variant))[0]
            _table(folder / "data" / name / f"{variant}.parquet", vectors, opened.axis)
            if variant == "raw" or "raw" not in variants:
                leaving.WRITERS[".safetensors"](folder / "vectors" / f"{name}.safetensors", vectors)
            about = vectors[0].about
            configs[name] = {
                "model": about["model"],
                "method": method,
                "emotions": [vector.emotion for vector in vectors],
                "layers": list(dict.fromkeys(layer for vector in vectors for layer in vector.vectors)),
                "d_model": len(next(iter(vectors[0].vectors.values()))),
                "variants": list(dict.fromkeys(variants)),
                "protocol": about.get("protocol") or {},
            }
    if plan := _plan(opened):
        (folder / "plan.yaml").write_text(plan, encoding="utf-8")
    files = [f"vectors/{name}.safetensors" for name in configs]
    (folder / "README.md").write_text(card(opened, title, configs, files), encoding="utf-8")
    about = {
        "nsteer": __version__,
        "layout": 1,
        "vectors": {
            f"vectors/{name}.safetensors": {
                "sha256": hashlib.sha256((folder / f"vectors/{name}.safetensors").read_bytes()).hexdigest(),
                "model": config["model"],
            }
            for name, config in configs.items()
        },
    }
    (folder / MANIFEST).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _plan(opened: Results) -> str:
    """The plan of the last run that the store keeps."""
    if "runs" not in opened:
        return ""
    plans = [str(text) for text in opened["runs"].plan.values.tolist() if text]
    return plans[-1] if plans else ""


def _table(file: Path, vectors: Sequence[Outgoing], axis: str) -> None:
    """A row a vector, in Parquet; `axis` is what the store calls the axis of emotions."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ExchangeError("the tables of a repository need pyarrow: pip install 'nsteer[hub]'") from error
    number = pa.float32()
    columns = {
        axis: pa.array([vector.emotion for vector in vectors]),
        "vector": pa.array(
            [[v.tolist() for v in vector.vectors.values()] for vector in vectors], pa.list_(pa.list_(number))
        ),
        "layers": pa.array([list(vector.vectors) for vector in vectors], pa.list_(pa.int32())),
        "norm": pa.array([list(vector.about["norms"].values()) for vector in vectors], pa.list_(number)),
        "site": pa.array([vector.about["site"] for vector in vectors]),
        "n_samples": pa.array([vector.about["n_samples"] for vector in vectors], pa.int32()),
        "n_distinct": pa.array([vector.about["n_distinct"] for vector in vectors], pa.int32()),
        "fingerprint": pa.array([vector.about["store"]["fingerprint"] for vector in vectors]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), file)


def _sent(repo: str, folder: Path, revision: str | None, public: bool, name: str) -> tuple[str, str]:
    """Uploads a folder as one commit. Returns its address and the commit."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="nsteer", library_version=__version__)

    def send() -> tuple[str, str]:
        repository = api.create_repo(repo, repo_type=TYPE, private=not public, exist_ok=True)
        if revision is not None and revision != "main":
            api.create_branch(repo, branch=revision, repo_type=TYPE, exist_ok=True)
        said = f"Vectors of {name}, by nsteer {__version__}"
        info = api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, repo_type=TYPE, revision=revision, commit_message=said
        )
        return str(repository), str(info.oid)

    return _asked(repo, send)


def _asked(repo: str, does: Callable[[], T]) -> T:
    """What the hub answers. Raises ExchangeError, in a line, for whatever it refuses."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        raise ExchangeError(f"{repo}: the hub is not asked while HF_HUB_OFFLINE is set")
    import httpx

    try:
        return does()
    except HfHubHTTPError as error:
        status = int(getattr(error.response, "status_code", 0))
        hint = {401: "; log in: hf auth login, or HF_TOKEN", 403: "; has your token the right to write there?"}
        words = masked(" ".join(str(error.server_message or error).split())[:200])
        raise ExchangeError(f"{repo}: the hub answered {status}: {words}{hint.get(status, '')}") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, OSError) as error:
        raise ExchangeError(f"{repo}: the hub can not be reached ({type(error).__name__})") from error


def pull(
    address: str,
    store: str | os.PathLike,
    *,
    model: str | None = None,
    revision: str | None = None,
    label: str | None = None,
    method: str | None = None,
    emotion: str | None = None,
    concept: str | None = None,
) -> Imported:
    """Puts the vectors of a repository `hub:OWNER/NAME[@REVISION]` into a store.

    model : of which model, where the repository has several, or under which id it is found here
    revision : of the model; that with which the vectors were made when left out
    The store's `imports` keeps the repository, its commit and all that its files say. Raises as `bring_in` does.
    """
    repo, _, branch = address.removeprefix(PREFIX).partition("@")
    if not REPO.fullmatch(repo):
        raise ExchangeError(f"{address!r}: expected hub:OWNER/NAME, or hub:OWNER/NAME@REVISION")
    with tempfile.TemporaryDirectory() as folder:
        commit, files = _fetched(repo, branch or None, Path(folder))
        wanted = _of_model(repo, files, model)
        cells, notes = dict[tuple[str, str, str], list[int]](), list[str]()
        for name, about in wanted.items():
            known = about["model"]
            record = bring_in(
                Path(folder) / name,
                store,
                model=model if model is not None and model != known["label"] else known["id"],
                revision=revision or (known.get("revision") or None if model in (None, known["label"]) else None),
                label=label or (known["label"] if known["label"] != known["id"] else None),
                method=method,
                emotion=emotion,
                concept=concept,
                origin={"hub": repo, "commit": commit, "path": name},
            )
            cells |= record.cells
            notes += [note for note in record.notes if note not in notes]
    return Imported(cells, notes, record.axis)


def _fetched(repo: str, revision: str | None, folder: Path) -> tuple[str, Mapping[str, Mapping[str, Any]]]:
    """The commit that a revision is, and the files of vectors that its manifest names, in a folder."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="nsteer", library_version=__version__)
    commit = _asked(repo, lambda: str(api.repo_info(repo, repo_type=TYPE, revision=revision).sha))

    where: dict[str, Any] = {"repo_type": TYPE, "revision": commit, "local_dir": folder}

    def get(name: str) -> Path:
        return Path(_asked(repo, lambda: api.hf_hub_download(repo, name, **where)))

    try:
        said = bounded.mapping(bounded.parsed(get(MANIFEST).read_bytes()))
        files = {str(name): bounded.mapping(entry) for name, entry in bounded.mapping(said["vectors"]).items()}
        if said.get("layout") != 1 or not all(re.fullmatch(r"vectors/[^/\\]+\.safetensors", name) for name in files):
            raise ValueError("another layout")
        for card in files.values():
            model = bounded.mapping(card["model"])
            if not all(isinstance(model.get(name), str) for name in ("label", "id", "revision")):
                raise ValueError("a model without id")
    except (ValueError, KeyError, TypeError) as error:
        raise ExchangeError(f"{repo}: its {MANIFEST} is not as `nsteer push` writes it ({error})") from error
    for name, card in files.items():
        digest = hashlib.sha256(get(name).read_bytes()).hexdigest()
        if digest != card.get("sha256"):
            raise ExchangeError(f"{repo}: {name} is not the file that its {MANIFEST} names (SHA-256 {digest[:12]}…)")
    return commit, files


def _of_model(repo: str, files: Mapping[str, Mapping[str, Any]], model: str | None) -> Mapping[str, Mapping[str, Any]]:
    """The files of the model named: by its label or id there; where all are of one model, its id here."""
    labels = {card["model"]["label"]: card["model"]["id"] for card in files.values()}
    mine = {name: card for name, card in files.items() if model in (None, card["model"]["label"], card["model"]["id"])}
    if mine:
        return mine
    if len(labels) == 1:
        return files
    raise ExchangeError(f"{repo} has no vectors of {model!r}; it has those of {', '.join(labels)}")
