"""The groups that a store may hold, and what upkeep must know of each: the one list of them."""

from __future__ import annotations

from dataclasses import dataclass

from nsteer.system.names import slug


@dataclass(frozen=True)
class Product:
    """One kind of group.

    by_model : one group a model, `<name>/<slug of its label>`, whose label is the only one on its dim `model`
    wanted : a plan wants its cells, each with a fingerprint; other groups are kept whatever a plan says
    searched : its second dim is `op`, where `nsteer tune` puts what it walks through
    explains : the label that each of its cells explains, which is kept as long as a plan has it
    diary : tells how and where results came to be, so stores of the same results differ in it
    reported : what a report made of the others, and makes again: stores of the same results need not both have it
    """

    by_model: bool = False
    wanted: bool = False
    searched: bool = False
    explains: str = ""
    diary: bool = False
    reported: bool = False


_OF_MODEL = Product(by_model=True, wanted=True)
_CUBE = Product(wanted=True, searched=True)
_RECORDED = Product(wanted=True)
_KEPT = Product()
_DIARY = Product(diary=True)
_REPORTED = Product(reported=True)

PRODUCTS: dict[str, Product] = {
    "samples": _OF_MODEL,
    "activations": _OF_MODEL,
    "embeddings": _OF_MODEL,
    "swapped": _OF_MODEL,
    "vectors": _OF_MODEL,
    "responses": _OF_MODEL,
    "responses_judged": _OF_MODEL,
    "lens": _OF_MODEL,
    "anisotropy": _OF_MODEL,
    "reads": _OF_MODEL,
    "streams": _OF_MODEL,
    "read_receipts": _OF_MODEL,
    "stream_receipts": _OF_MODEL,
    "calibration": _CUBE,
    "unsteered": _CUBE,
    "prompted": _CUBE,
    "outcomes_prompted": _CUBE,
    "judged_prompted": _CUBE,
    "generations": _CUBE,
    "steering": _CUBE,
    "steering_also": _CUBE,
    "outcomes": _CUBE,
    "outcomes_unsteered": _CUBE,
    "capability": _CUBE,
    "capability_unsteered": _RECORDED,
    "capability_edited": _RECORDED,
    "projections": _CUBE,
    "projections_unsteered": _CUBE,
    "judged": _CUBE,
    "judged_unsteered": _CUBE,
    "edited": _RECORDED,
    "edited_receipts": _RECORDED,
    "calibration_edits": _RECORDED,
    "projections_edited": _RECORDED,
    "outcomes_edited": _RECORDED,
    "judged_edited": _RECORDED,
    "tuned": _KEPT,
    "imports": _DIARY,
    "failures": _KEPT,
    "models": Product(explains="model", diary=True),
    "methods": Product(explains="method", diary=True),
    "ops": Product(explains="op"),
    "edits": Product(explains="edit"),
    "directions": Product(explains="direction"),
    "judges": Product(explains="judge"),
    "replies": _DIARY,
    "judge_passages": Product(explains="judge"),
    "runs": _DIARY,
    "programs": _DIARY,
    "jobs": _DIARY,
    "verification": _DIARY,
    "claims": _DIARY,
    "summary/dose_response": _REPORTED,
    "summary/turning_points": _REPORTED,
    "summary/regimes": _REPORTED,
    "summary/changed_script": _REPORTED,
    "summary/promoted_tokens": _REPORTED,
    "summary/rsa": _REPORTED,
    "summary/separation": Product(by_model=True, reported=True),
    "summary/swap": Product(by_model=True, reported=True),
}
"""By the path of the group, without the name of its model."""


def path(product: str, model: str) -> str:
    """Where a model's cells of a kind of group lie."""
    return f"{product}/{slug(model)}" if PRODUCTS[product].by_model else product


def product_of(path: str) -> Product:
    """The kind of the group at a path; of one that nobody declared nothing is known, and it is kept."""
    name = path.rpartition("/")[0]
    if name in PRODUCTS and PRODUCTS[name].by_model:
        return PRODUCTS[name]
    product = PRODUCTS.get(path, _KEPT)
    return _KEPT if product.by_model else product
