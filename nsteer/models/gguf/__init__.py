"""GGUF files, llama.cpp's format of a model: their headers (`header`), and folders made of them (`converting`)."""

from nsteer.models.gguf.converting import converted, folder, is_there
from nsteer.models.gguf.header import SUFFIX, Header, adds, config, ends, faults, grown, read, special, template

__all__ = [
    "SUFFIX",
    "Header",
    "adds",
    "config",
    "converted",
    "ends",
    "faults",
    "folder",
    "grown",
    "is_there",
    "read",
    "special",
    "template",
]
