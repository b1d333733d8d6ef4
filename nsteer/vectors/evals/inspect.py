"""Turns a model and a stored vector into a model of Inspect: `nsteer/MODEL`, with the vector as model arguments.

Inspect finds it by the entry point `inspect_ai` of the package.

    inspect eval task.py --model nsteer/zoo/llama -M vector=store/quickstart.zarr:generation/happy -M strength=0.2
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, modelapi

from nsteer.errors import SteerError
from nsteer.vectors.evals.steered import Held, Wanted, facts_of, hold


@modelapi(name="nsteer")
def nsteer() -> type[ModelAPI]:
    """The provider: Inspect's own for transformers, its model steered."""
    from inspect_ai.model._providers.hf import HuggingFaceAPI

    class Steered(HuggingFaceAPI):
        """model_args : those of `steered.Wanted`, `revision`, and those of Inspect's provider `hf`."""

        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: GenerateConfig = GenerateConfig(),  # noqa: B008  (Inspect's own signature)
            **model_args: Any,
        ):
            mine = {field.name: model_args.pop(field.name) for field in fields(Wanted) if field.name in model_args}
            if "vector" not in mine:
                raise SteerError("-M vector=STORE:METHOD/EMOTION: which vector steers (nothing steers: provider hf)")
            wanted = Wanted(**mine)
            facts = facts_of(model_name, model_args.get("revision"), wanted.label)
            model_args.setdefault("dtype", "float32")  # as plans load models
            super().__init__(model_name, base_url, api_key, config, model_path=str(facts.name_or_path), **model_args)
            self.held: Held = hold(self.model, facts, wanted)

        async def generate(self, *args: Any, **kwargs: Any) -> ModelOutput:
            """As `hf` does; the output's metadata say what steered it, and what the edits have done so far."""
            completion = await super().generate(*args, **kwargs)
            said = {**self.held.about, "receipts": self.held.receipts()}
            completion.metadata = {**(completion.metadata or {}), "nsteer": said}
            return completion

        def close(self) -> None:
            self.held.close()
            super().close()

    return Steered
