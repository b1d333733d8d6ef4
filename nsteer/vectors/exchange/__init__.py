"""Steering vectors from a store to files that other programs read, and from their files into a store.

Formats: safetensors with JSON metadata, llama.cpp control vectors (GGUF; repeng and EasySteer use them too), JSON
payloads of EasySteer, lm-eval's `steered` configs, numpy's .npz; read also: .npy and .pt of tensors (persona vectors).
`hub` puts vectors into a repository of the Hugging Face Hub, and takes them from one.
No file is unpickled that could bring code, what one declares is compared with what it holds, and no layer is guessed.
"""

from nsteer.vectors.exchange.arriving import Imported, bring_in, read
from nsteer.vectors.exchange.assigning import ROWS, numbers
from nsteer.vectors.exchange.contents import CONVENTIONS, Contents
from nsteer.vectors.exchange.hub import PREFIX, Pushed, pull, push
from nsteer.vectors.exchange.leaving import KINDS, SCALES, export

__all__ = [
    "CONVENTIONS",
    "KINDS",
    "PREFIX",
    "ROWS",
    "SCALES",
    "Contents",
    "Imported",
    "Pushed",
    "bring_in",
    "export",
    "numbers",
    "pull",
    "push",
    "read",
]
