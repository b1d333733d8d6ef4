"""Commands about nsteer itself: schema, doctor. Heavy imports happen inside commands."""

from __future__ import annotations

import json
import sys

import click

from nsteer.cli.base import AS_JSON, command, ray_address, say


@command
def schema() -> None:
    """Print the JSON Schema of plans, for editors.

    \b
    Example:
      nsteer schema > nsteer.schema.json
    """
    from nsteer.cli.reference import json_schema

    say(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@command
@click.option("--remote", is_flag=True, help="Also ask the NDIF server: reachable, key accepted, models running.")
@click.option("--host", metavar="URL", help="The NDIF server, with --remote.")
@click.option("--on", metavar="ray[://…]", callback=ray_address, help="Also check a Ray cluster and its nodes.")
@AS_JSON
def doctor(remote: bool, host: str | None, on: str | None, as_json: bool) -> None:
    """Check this installation: versions, combinations known to fail, devices, memory, caches.

    \b
    Example:
      nsteer doctor --remote
    """
    from dataclasses import asdict

    from nsteer.executors import doctor as surgery
    from nsteer.report import terminal

    findings = surgery.report(remote, host)
    if on is not None:
        from nsteer.cluster import looking

        findings += looking.findings(on)
    if as_json:
        say(json.dumps([asdict(finding) for finding in findings]))
    else:
        terminal.print_findings(findings)
    if surgery.worst(findings) == surgery.BAD:
        sys.exit(1)
