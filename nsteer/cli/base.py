"""What all commands share: the group, the arguments, and how errors become messages and exit codes."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from nsteer import __version__
from nsteer.errors import (
    ArgumentsError,
    ExecutionError,
    NsteerError,
    PlanError,
    RoomError,
    StoreError,
    StoreWarning,
    masked,
    printable,
)
from nsteer.plan import named
from nsteer.science import axis


def located(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The file of a plan that may be called by its name alone; says which it is."""
    file, said = named.find(value)
    if said:
        say(f"note: {said}", err=True)
    return str(file) if said else value  # as it was given: a path would make another address of s3://...


PLAN = click.argument("plan", type=click.Path(dir_okay=False), callback=located)
SET = click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Override a plan field; repeatable.")
OUTSIDE = click.option(
    "--allow-outside", is_flag=True, help="Let PLAN name texts, vectors and plans outside its folder and this one."
)
HOST = click.option("--host", metavar="URL", help="The NDIF server, whatever PLAN says; it gets your API key.")
TRUST = click.option(
    "--trust-remote-code", is_flag=True, help="Let models run code of their own, where PLAN says trust_remote_code."
)
TRUST_JUDGE = click.option("--trust-judge", is_flag=True, help="Let judges of PLAN run Python functions (`python`).")
ON = "Workers on Ray: `ray` (RAY_ADDRESS, else this machine) or `ray://HOST:PORT` (nsteer[ray])."
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def ray_address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The address that `--on` gives: "" for `ray` alone, None where it is not given."""
    if value is None or value == "ray":
        return None if value is None else ""
    if value.startswith("ray://") and value != "ray://":
        return value
    raise click.BadParameter(f"{value!r}; give `ray` or `ray://HOST:PORT`")


class Masked(click.Group):
    """A group in whose usage errors, which repeat the arguments, no address holds a password."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = masked(error.message)  # type: ignore[misc]
            raise


@click.group(cls=Masked, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nsteer")
def main() -> None:
    """Read and edit the residual streams of language models: plans in, labelled arrays out."""
    # what other libraries say of texts, labels and servers, in warnings, logs and tracebacks, is text like any other
    warnings.formatwarning = _warning_line
    logging.setLogRecordFactory(_printable_record)
    sys.excepthook = _printable_traceback


def say(text: object, err: bool = False, lines: bool = True) -> None:
    """Prints text of ours, and of others' in it: all that commands print without a table."""
    click.echo(printable(text, lines), err=err)


def speak_of(name: str) -> None:
    """Has what the command says from now on call the axis of emotions by this name."""
    click.get_current_context().with_resource(axis.named(name))


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    ours = issubclass(category, StoreWarning)
    return printable(f"note: {message}" if ours else f"{filename}:{lineno}: {category.__name__}: {message}") + "\n"


def _printable_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip(), err=True)


def _printable_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    record.msg, record.args = printable(record.getMessage()), ()
    return record


def command(function: Callable) -> Callable:
    """Turns errors raised on purpose into messages and exit codes: 2 for a bad plan, 1 for the rest."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except PlanError as error:
            count = len(error.problems)
            say(f"{error}\n{count} problem{'s' if count > 1 else ''}; no model was loaded", err=True)
            sys.exit(2)
        except NsteerError as error:
            lines = isinstance(error, ArgumentsError | ExecutionError)  # of the latter a server's own traceback
            say(f"error: {error}", err=True, lines=lines)
            sys.exit(1)
        except KeyboardInterrupt as error:
            words = "interrupted; what was committed is kept: the same command goes on from there"
            say(getattr(error, "words", words), err=True)
            sys.exit(128 + getattr(error, "signal", 2))

    return main.command(function.__name__.rstrip("_"))(guarded)  # `import` is no name for a function


def of_store(function: Callable) -> Callable:
    """For commands that compute from a store, which a stranger may have filled: each of its documents may be right and
    one still contradict another. That is told like any other damage."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (NsteerError, OSError, click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except MemoryError as error:
            raise RoomError("there is not enough memory for what the store holds") from error
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise StoreError(
                f"what the store holds does not fit together ({words}); see nsteer verify, and report this if it finds "
                "nothing"
            ) from error

    return guarded
