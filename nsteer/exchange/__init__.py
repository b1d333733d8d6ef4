"""Steering vectors from a store to files that other programs read, and from their files into a store.

Formats: safetensors with JSON metadata, llama.cpp control vectors (GGUF; repeng and EasySteer use them too), JSON
payloads of EasySteer, lm-eval's `steered` configs; read also: .npz and .pt of tensors (persona vectors). No file is
unpickled that could bring code.
"""

from nsteer.exchange.arriving import bring_in, read
from nsteer.exchange.contents import CONVENTIONS, Contents
from nsteer.exchange.leaving import KINDS, SCALES, export

__all__ = ["CONVENTIONS", "KINDS", "SCALES", "Contents", "bring_in", "export", "read"]
