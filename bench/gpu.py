"""Local and vLLM executors on a GPU against plain `generate`, one command, at most 8 minutes.

    python bench/gpu.py [--minutes 8] [-o bench/gpu.json]

In an environment with a GPU build of vLLM (docs/vllm.md); nothing is downloaded: the model is Llama-shaped, of 1.1
billion random weights in bfloat16. Written for whoever has a GPU: it has run on none so far; `bench/engines.py`, whose
measurements these are, has on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import click
from engines import HERE, Subject, measured, report

LARGE = Subject(
    layers=22,
    width=2048,
    heads=32,
    vocab=32000,
    dtype="bfloat16",
    device="cuda",
    texts=2048,
    vectors=60,
    new=64,
    rows=256,
)


@click.command()
@click.option("--minutes", default=8.0, show_default=True, help="When no further round is begun.")
@click.option("-o", "output", type=Path, default=HERE / "gpu.json", show_default=False)
def main(minutes: float, output: Path) -> None:
    """Measures on a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException("no GPU: bench/engines.py measures on a CPU")
    measures = measured(LARGE, threads=1, repeats=5, seconds=60 * minutes * 0.8)
    report({"gpu": torch.cuda.get_device_name(0), **measures}, output)


if __name__ == "__main__":
    main()
