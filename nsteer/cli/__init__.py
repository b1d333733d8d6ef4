"""The command line: thin commands over the library, one module for what a command takes."""

from nsteer.cli import plans, stores, system, vectors
from nsteer.cli.base import main

__all__ = ["main", "plans", "stores", "system", "vectors"]
