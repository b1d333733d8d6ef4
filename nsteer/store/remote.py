"""A store on object storage: the same protocol by whole PUTs, with a lease in place of the lock of a disk.

A PUT is atomic and, once it returned, there for every reader; so cells are committed as on a disk. What a disk gives
and object storage does not is a lock that dies with its holder. Here the lock is an object beside the store, made by
a PUT that succeeds only where nothing is (If-None-Match). Its holder renews it; one that was not renewed for LEASE
seconds is taken over, by a PUT that succeeds only over the version that was seen (If-Match). Documents are put the
same way, so a holder that slept through its lease publishes nothing over what came in since.

Credentials and endpoints come from the environment or the configuration of the storage's own client, never from here.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nsteer.errors import StoreError
from nsteer.store.places import LOCK_SECONDS, Changed

LEASE = 30.0
"""Seconds after which a lock that nobody renews is taken over: how long a killed `prepare` holds up the next one."""

POLL = 0.3
TRIES = 10
"""Times that the storage's own client asks, with pauses that grow: where 20 % fail, one request in ten million does."""

REFUSED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "fsspec.exceptions": ("FSTimeoutError",),
}


def check_url(url: str) -> None:
    """Raises StoreError for a URL that holds credentials; the message does not repeat them."""
    scheme, _, rest = url.partition("://")
    if "@" in rest or "?" in rest:
        raise StoreError(
            f"the {scheme}:// URL of a store must not hold credentials; set them in the environment, "
            "as the storage's own client reads them"
        )
    if not rest.strip("/"):
        raise StoreError(f"{url!r} names no store; give a bucket and a path, such as s3://bucket/study.zarr")


class Remote:
    """What a URL names: s3://bucket/study.zarr, or another scheme that fsspec knows. Nothing is opened until used."""

    timed = False  # stamps are of an object's version
    guarded = False  # a commit is PUTs alone: it takes no lock

    def __init__(self, url: str):
        check_url(url)
        self.name = url.rstrip("/")
        self._held: tuple[str, float] | None = None  # the token of our lease, and when it was renewed
        self._opened: Any = None

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        error_types: list[type[Exception]] = [OSError]
        for module, names in ERRORS.items():
            with contextlib.suppress(ImportError):
                error_types += [getattr(importlib.import_module(module), name) for name in names]
        return tuple(error_types)

    # ---- the file system ------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        """What every use of the client needs: no list that it remembers, no two requests for one object."""
        fresh = {"use_listings_cache": False}
        patient = {"retries": {"mode": "standard", "max_attempts": TRIES}}
        return {**fresh, "max_concurrency": 1, "config_kwargs": patient} if self.s3 else fresh

    @property
    def s3(self) -> bool:
        return self.name.startswith(("s3://", "s3a://"))

    @property
    def _fs(self) -> Any:
        if self._opened is None:
            from fsspec import url_to_fs

            try:
                self._opened = url_to_fs(self.name, **self._options())
            except ImportError as error:
                extra = "pip install 'nsteer[s3]'" if self.s3 else str(error)
                raise StoreError(f"{self.name}: the client of this storage is not installed: {extra}") from error
            except ValueError as error:
                raise StoreError(f"{self.name}: {error}") from error
        return self._opened[0]

    def _path(self, name: str) -> str:
        root = (self._fs, self._opened[1])[1].rstrip("/")
        return f"{root}/{name}" if name else root

    def age(self, name: str) -> float:
        info = self._info(name) or {}
        put = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("created")
        if isinstance(put, str):
            put = datetime.datetime.fromisoformat(put)
        put = put.timestamp() if isinstance(put, datetime.datetime) else put
        return max(0.0, time.time() - put) if put else 0.0

    @property
    def files(self) -> Any:
        return self.target("")

    def target(self, name: str) -> Any:
        from zarr.storage import FsspecStore

        _ = self._fs  # says what is not installed
        return FsspecStore.from_url(f"{self.name}/{name}" if name else self.name, storage_options=self._options())

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except self.refusals as error:
            raise StoreError(f"{self.name}/{name} can not be read: {error or type(error).__name__}") from error

    # ---- files ----------------------------------------------------------------------------------------------

    def occupied(self) -> bool:
        return next(iter(self.walk()), None) is not None or self._info("") is not None

    def _info(self, name: str) -> dict | None:
        with self._reading(name):
            return self._info_at(self._path(name))

    def _info_at(self, path: str) -> dict | None:
        try:
            info = self._fs.info(path, **({"refresh": True} if self.s3 else {}))
        except FileNotFoundError:
            return None
        return info if info.get("type") == "file" else None

    def read(self, name: str) -> bytes | None:
        try:
            with self._reading(name):
                return self._fs.cat_file(self._path(name))
        except (FileNotFoundError, IsADirectoryError):
            return None

    def versioned(self, name: str) -> tuple[bytes | None, str]:
        while True:
            before = _version(self._info(name))
            content = self.read(name)
            if _version(self._info(name)) == before:
                return content, before

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        with self._reading(""):
            contents = self._fs.cat(list(paths), on_error="return")
        if not isinstance(contents, dict):  # fsspec unwraps a list of one
            contents = {next(iter(paths)): contents}
        for path, content in contents.items():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise StoreError(f"{self.name}/{paths[path]} can not be read: {content}") from content
        return {paths[path]: content for path, content in contents.items() if isinstance(content, bytes)}

    def read_stamped(self, names: Sequence[str]) -> Iterator[tuple[int, bytes] | None]:
        stamps = self.stamps(list(names))  # before the contents: a file put in between must not pass for read
        contents = self.read_all(names)
        for name, stamp in zip(names, stamps, strict=True):
            yield (stamp, contents[name]) if stamp and name in contents else None

    def stamps(self, names: list[str]) -> list[int]:
        if len(names) <= 4:
            return [_stamp(self._info(name)) for name in names]
        folders = {name.rpartition("/")[0] for name in names}
        stamp_by_name = {name: _stamp(info) for folder in folders for name, info in self._list(folder).items()}
        return [stamp_by_name.get(name, 0) for name in names]

    def _list(self, folder: str) -> dict[str, dict]:
        """The files right in a folder: name from the root -> what the storage tells of it."""
        try:
            with self._reading(folder):
                entries = self._fs.ls(self._path(folder), detail=True, **({"refresh": True} if self.s3 else {}))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        ends = [(entry["name"].rstrip("/").rpartition("/")[2], entry) for entry in entries if entry["type"] == "file"]
        return {f"{folder}/{end}" if folder else end: entry for end, entry in ends}

    def names(self, folder: str) -> list[str]:
        return [name.rpartition("/")[2] for name in self._list(folder)]

    def walk(self, folder: str = "") -> Iterator[tuple[str, int]]:
        start = self._path("").strip("/")
        try:
            with self._reading(folder):
                info_by_path = self._fs.find(self._path(folder), detail=True)
        except FileNotFoundError:
            return
        for path, info in info_by_path.items():
            name = path.strip("/").removeprefix(start).lstrip("/")
            if name and not path.endswith("/"):  # a marker of a folder is no file
                yield name, info.get("size") or 0

    def write(self, name: str, content: bytes, over: str | None = None) -> None:
        self._renew()
        self._put(self._path(name), content, over)

    def _put(self, path: str, content: bytes, over: str | None = None) -> None:
        """One PUT. Raises Changed where `over` ("" for nothing there) is not what stands there.

        A PUT whose answer was lost is asked again by the client, and refused, since its own first one went through:
        what stands there then is ours.
        """
        try:
            self._put_once(path, content, over)
        except Changed:
            if not self._stands(path, content):
                raise

    def _stands(self, path: str, content: bytes) -> bool:
        try:
            with self._reading(path):
                return self._fs.cat_file(path) == content
        except FileNotFoundError:
            return False

    def _put_once(self, path: str, content: bytes, over: str | None) -> None:
        try:
            if over is None:
                self._fs.pipe_file(path, content)
            elif over == "":
                self._fs.pipe_file(path, content, mode="create")
            elif self.s3:
                bucket, key, _ = self._fs.split_path(path)
                self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=content, IfMatch=over)
            else:  # no condition that all other storages share: the lease alone has to do
                self._fs.pipe_file(path, content)
        except FileExistsError as error:
            raise Changed from error
        except self.refusals as error:
            if REFUSED & set(_codes(error)):
                raise Changed from error
            raise

    def delete(self, name: str) -> bool:
        if self._info(name) is None:
            return False
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))
        return True

    def remove(self, folder: str) -> None:
        for name, _ in list(self.walk(folder)):
            self.delete(name)

    @contextlib.contextmanager
    def committing(self, group: str) -> Iterator[None]:
        """Nobody is kept out: records are only put where none is, and readers compare values with them."""
        yield

    def seal(self, name: str, content: bytes) -> None:
        self._put(self._path(name), content, over="")

    def sweep(self, folders: Iterable[str]) -> None:
        """Nothing to sweep: a PUT that was killed leaves nothing."""

    def sync(self) -> None:
        """Nothing to wait for: a PUT that returned is kept."""

    # ---- the lease ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        path, token = f"{self._path('')}.lock", secrets.token_hex(8)
        self._acquire(path, token)
        self._held = token, time.monotonic()
        try:
            yield
        finally:
            self._held = None
            if self._holder(path)[0] == token:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    def _acquire(self, path: str, token: str) -> None:
        start = time.monotonic()
        seen, since = "", start
        while True:
            holder, version = self._holder(path)
            if holder == token:
                return  # our PUT went through, only its answer was lost
            now = time.monotonic()
            if version != seen:
                seen, since = version, now
            if holder is None or now - since >= LEASE:
                with contextlib.suppress(Changed):
                    self._put(path, _lease(token), over=version)
                    if holder is None or self.s3 or self._holder(path)[0] == token:
                        return
            if now - start > LOCK_SECONDS:
                raise StoreError(f"another process has held {self.name}.lock for {LOCK_SECONDS} s; wait for it")
            time.sleep(POLL)

    def _holder(self, path: str) -> tuple[str | None, str]:
        """The token in the lease and the version of it; None where there is no lease."""
        while True:
            before = self._info_at(path)
            if before is None:
                return None, ""
            with contextlib.suppress(FileNotFoundError):
                token = json.loads(self._fs.cat_file(path))["holder"]
                if _version(self._info_at(path)) == _version(before):
                    return token, _version(before)

    def assure(self) -> None:
        self._renew(sure=True)

    def _renew(self, sure: bool = False) -> None:
        """Before a write under the lock: the lease is still ours, and stays so. `sure`: asks, however young it is."""
        if self._held is None or (not sure and time.monotonic() - self._held[1] < LEASE / 3):
            return
        path, token = f"{self._path('')}.lock", self._held[0]
        holder, version = self._holder(path)
        try:
            if holder != token:
                raise Changed
            self._put(path, _lease(token), over=version)
        except Changed:
            raise StoreError(
                f"{self.name}: this process slept longer than {LEASE:.0f} s while it changed the structure, and "
                "another took over; run again"
            ) from None
        self._held = token, time.monotonic()


def _lease(token: str) -> bytes:
    """What stands in the lock: who holds it, by a random number; another content at each renewal."""
    return json.dumps({"holder": token, "renewed": secrets.token_hex(4), "seconds": LEASE}).encode()


def _version(info: dict | None) -> str:
    """The version of an object as a condition of a PUT takes it; "" where there is none."""
    if info is None:
        return ""
    told = info.get("ETag") or info.get("etag") or info.get("generation") or info.get("created") or info.get("mtime")
    return str(told or info)


def _stamp(info: dict | None) -> int:
    """A number that changes when an object is put again; 0 where there is none."""
    if info is None:
        return 0
    return int(hashlib.sha256(_version(info).encode()).hexdigest()[:15], 16) | 1


def _codes(error: BaseException | None) -> Iterator[str]:
    """The codes that a server gave for an error and its causes."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            yield str(response.get("Error", {}).get("Code", ""))
            yield str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        error = error.__cause__ or error.__context__
