"""What must hold of every op whatever the numbers are: its algebra, and what its docstring says."""

from __future__ import annotations

import pytest
import torch

from nsteer.cli.reference import ops as page
from nsteer.program.ops import ACTING_AT_ZERO, DIRECTIONAL, OPS, REFERENCED, UNSCALED

ROWS, POSITIONS, WIDTH = 3, 5, 16


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STREAM = 7 * drawn(0, ROWS, POSITIONS, WIDTH)
VECTOR = torch.nn.functional.normalize(drawn(1, ROWS, WIDTH), dim=-1)
REFERENCE = drawn(2, ROWS)


def after(op: str, amount, stream=STREAM, vector=VECTOR) -> torch.Tensor:
    """The stream after an op; `amount` a number for all rows or one a row."""
    amount = torch.as_tensor(amount, dtype=torch.float32).expand(len(stream))
    more = (REFERENCE[: len(stream)],) if op in REFERENCED else ()
    return stream + OPS[op](stream, vector, amount, *more)


def along(stream: torch.Tensor, vector=VECTOR) -> torch.Tensor:
    return torch.einsum("rpd,rd->rp", stream, vector)


def angle(stream: torch.Tensor, vector=VECTOR) -> torch.Tensor:
    return torch.rad2deg(torch.arccos((along(stream, vector) / stream.norm(dim=-1)).clamp(-1, 1).double())).float()


def rest(stream: torch.Tensor) -> torch.Tensor:
    """What is at right angles to the vector."""
    return stream - along(stream)[..., None] * VECTOR[:, None]


def same(actual, expected, tolerance=1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("op", OPS)
def test_every_row_has_its_own_strength_and_vector(op):
    amounts = torch.tensor([0.3, -0.8, 2.0]) * (20 if op == "rotate" else 1)
    for row in range(ROWS):
        same(after(op, amounts)[row], STREAM[row] + _alone(op, amounts, row))


def _alone(op: str, amounts: torch.Tensor, row: int) -> torch.Tensor:
    more = (REFERENCE[row : row + 1],) if op in REFERENCED else ()
    return OPS[op](STREAM[row : row + 1], VECTOR[row : row + 1], amounts[row : row + 1], *more)[0]


@pytest.mark.parametrize("op", sorted(set(OPS) - set(ACTING_AT_ZERO)))
def test_strength_zero_is_nothing(op):
    assert (after(op, 0.0) == STREAM).all()


@pytest.mark.parametrize("op", ACTING_AT_ZERO)
def test_the_others_act_at_strength_zero(op):
    assert not torch.allclose(after(op, 0.0), STREAM, atol=0.1)


@pytest.mark.parametrize("op", sorted({*DIRECTIONAL} - {"rotate"}))
@pytest.mark.parametrize("amount", [0.4, 1.0])
def test_only_the_projection_changes(op, amount):
    same(rest(after(op, amount)), rest(STREAM))


@pytest.mark.parametrize(
    ("op", "amount"), [("project_out", 1.0), ("set_mean", 1.0), ("clamp", 2.5), ("affine", 2.5), ("affine", 0.0)]
)
def test_twice_is_once(op, amount):
    once = after(op, amount)
    same(after(op, amount, once), once)


def test_what_each_projection_becomes():
    same(along(after("add", 3.0)), along(STREAM) + 3)
    same(along(after("project_out", 0.25)), 0.75 * along(STREAM))
    same(along(after("clamp", -2.0)), torch.full((ROWS, POSITIONS), -2.0))
    same(along(after("set_mean", 1.0)), REFERENCE[:, None].expand(ROWS, POSITIONS))
    same(along(after("set_mean", 0.5)), (along(STREAM) + REFERENCE[:, None]) / 2)
    same(along(after("affine", 1.5)), (REFERENCE[:, None] + 1.5).expand(ROWS, POSITIONS))


def test_ops_that_are_others_in_another_guise():
    same(after("affine", 0.0), after("set_mean", 1.0))
    same(after("add", 2.0, after("set_mean", 1.0)), after("affine", 2.0))
    same(after("clamp", 0.0), after("project_out", 1.0))
    same(after("clamp", REFERENCE + 0.7), after("affine", 0.7))


# ---- rotation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [-200.0, -30.0, 5.0, 90.0, 400.0])
def test_a_rotation_keeps_every_length(degrees):
    same(after("rotate", degrees).norm(dim=-1), STREAM.norm(dim=-1), 1e-3)


@pytest.mark.parametrize("degrees", [-25.0, 12.5, 40.0])
def test_a_rotation_turns_by_so_many_degrees_in_the_plane_of_both(degrees):
    turned = after("rotate", degrees)
    same(angle(turned), angle(STREAM) - degrees, 1e-2)
    flat = torch.nn.functional.normalize(rest(STREAM), dim=-1)
    out_of_plane = rest(turned) - (rest(turned) * flat).sum(-1, keepdim=True) * flat
    same(out_of_plane, torch.zeros_like(STREAM))


def test_a_rotation_there_and_back():
    same(after("rotate", -30.0, after("rotate", 30.0)), STREAM)
    same(after("rotate", 20.0, after("rotate", 10.0)), after("rotate", 30.0))


def test_a_rotation_stops_at_the_vector_and_opposite_it():
    length = STREAM.norm(dim=-1, keepdim=True)
    same(after("rotate", 180.0), length * VECTOR[:, None], 1e-3)
    same(after("rotate", -180.0), -length * VECTOR[:, None], 1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("degrees", [-30.0, 30.0])
def test_where_there_is_no_plane_nothing_turns(sign, degrees):
    parallel = (sign * 40 * VECTOR)[:, None].expand(ROWS, POSITIONS, WIDTH).clone()
    assert (after("rotate", degrees, parallel) == parallel).all()
    nothing = torch.zeros_like(STREAM)
    assert (after("rotate", degrees, nothing) == nothing).all()


# ---- what is said of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_the_page_has_every_op_with_formula_unit_and_citation(op):
    said = page.op_words(OPS[op])
    assert all(said.values())
    assert ("no `scale`" in said["Strength"]) == (op in UNSCALED)
    assert ("m·v" in said["Formula"]) == (op in REFERENCED)
    assert f"| `{op}` |" in page.page()


def test_a_docstring_without_a_citation_is_refused():
    def op():
        """Does.

        Formula: h
        Strength: none
        """

    with pytest.raises(ValueError, match="Citation"):
        page.op_words(op)
