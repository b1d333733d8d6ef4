"""Layers: every way of naming them, in models of any depth."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nsteer.plan import layers
from nsteer.plan.layers import at_depth, label, problem_of, resolve


@pytest.mark.parametrize(
    ("spec", "n_layers", "indices"),
    [
        (0, 12, (0,)),
        (11, 12, (11,)),
        (-1, 12, (11,)),
        (-12, 12, (0,)),
        ("all", 3, (0, 1, 2)),
        ("2:6", 12, (2, 3, 4, 5)),
        ("0:12", 12, tuple(range(12))),
        (":2", 12, (0, 1)),
        ("10:", 12, (10, 11)),
        ("-2:", 12, (10, 11)),
        (":-10", 12, (0, 1)),
        ("0:12:5", 12, (0, 5, 10)),
        ("::4", 12, (0, 4, 8)),
        ("0.25:0.75", 12, (3, 4, 5, 6, 7, 8)),
        ("0.5:", 5, (2, 3, 4)),
        ("0.5:4", 5, (2, 3)),
        (0.0, 12, (0,)),
        (1.0, 12, (11,)),
        ([3, 1], 12, (1, 3)),
        ([0.25, 0.5, -1], 12, (3, 6, 11)),
        (["0:2", [5, [7]]], 12, (0, 1, 5, 7)),
    ],
)
def test_every_form_names_block_indices_in_ascending_order(spec, n_layers, indices):
    assert problem_of(spec) == ""
    assert resolve(spec, n_layers) == indices


@pytest.mark.parametrize("n_layers", range(1, 65))
def test_half_depth_is_integer_division(n_layers):
    assert at_depth(0.5, n_layers) == n_layers // 2  # the protocol of Jeong 2026


@pytest.mark.parametrize(
    ("depth", "n_layers", "layer"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.3, 10, 3), (0.29, 10, 2), (2 / 3, 12, 8), (0.999, 4, 3)],
)
def test_depth_rounds_down_but_forgives_binary_fractions(depth, n_layers, layer):
    assert at_depth(depth, n_layers) == layer


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ([], "an empty list"),
        ([1, []], "an empty list"),
        (True, "true"),
        (None, "nothing"),
        ({"each": 1}, "a mapping"),
        (1.5, "the depth 1.5"),
        (-0.5, "the depth -0.5"),
        (float("nan"), "the depth nan"),
        ("middle", "'middle'"),
        ("1:2:3:4", "'1:2:3:4'"),
        ("1:x", "'1:x'"),
        ("4:2:-1", "'4:2:-1'"),
        ("0:4:0", "'0:4:0'"),
        ("0.5:1.5", "'0.5:1.5'"),
        ([1, "last"], "'last'"),
    ],
)
def test_what_is_no_layer_is_told(spec, why):
    assert problem_of(spec) == why


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (4, "layer 4 of a model with 4 layers (0 to 3)"),
        (-5, "layer -5 of a model with 4 layers (0 to 3)"),
        ([0, 9], "layer 9 of a model with 4 layers (0 to 3)"),
        ("2:6", "'2:6' of a model with 4 layers (0 to 3)"),
        ("-5:2", "'-5:2' of a model with 4 layers (0 to 3)"),
        ("3:1", "'3:1', which names no layer of 4"),
        ("0.3:0.4", "'0.3:0.4', which names no layer of 4"),
        ([1, -3], "layer 1 named twice (the model has 4 layers)"),
        ([0.5, "0:3"], "layer 2 named twice (the model has 4 layers)"),
    ],
)
def test_layers_that_a_model_does_not_have(spec, why):
    assert problem_of(spec) == ""
    with pytest.raises(LookupError) as caught:
        resolve(spec, 4)
    assert caught.value.args[0] == why


@pytest.mark.parametrize(
    ("layers", "text"), [((0, 1, 2, 3), "all"), ((2,), "2"), ((1, 2), "1,2"), ((1, 2, 3), "1:4"), ((0, 2, 3), "0,2,3")]
)
def test_labels(layers, text):
    assert label(layers, 4) == text


DEPTH = st.integers(1, 80)
INDEX = st.integers(-90, 90)
SPEC = st.one_of(
    INDEX,
    st.floats(0, 1),
    st.just("all"),
    st.tuples(st.none() | INDEX, st.none() | INDEX, st.none() | st.integers(1, 5)).map(
        lambda edges: ":".join("" if edge is None else str(edge) for edge in edges)
    ),
)


@given(st.recursive(SPEC, lambda specs: st.lists(specs, min_size=1, max_size=3), max_leaves=4), DEPTH)
def test_resolved_layers_are_sorted_distinct_and_in_range(spec, n_layers):
    assert problem_of(spec) == ""
    try:
        indices = resolve(spec, n_layers)
    except LookupError:
        assume(False)
    assert indices and list(indices) == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < n_layers


@given(DEPTH, st.data())
def test_negative_and_positive_indices_meet(n_layers, data):
    layer = data.draw(st.integers(0, n_layers - 1))
    assert resolve(layer - n_layers, n_layers) == resolve(layer, n_layers) == (layer,)
    assert resolve(f"{layer - n_layers}:", n_layers) == resolve(f"{layer}:", n_layers)


@given(DEPTH, st.data())
def test_the_depth_of_a_layer_names_that_layer(n_layers, data):
    layer = data.draw(st.integers(0, n_layers - 1))
    assert resolve(layer / n_layers, n_layers) == (layer,)


@given(DEPTH, st.sets(st.integers(0, 79), min_size=1))
def test_distinct_sets_have_distinct_labels_that_read_back(n_layers, chosen):
    layers = tuple(sorted(layer for layer in chosen if layer < n_layers))
    assume(layers)
    text = label(layers, n_layers)
    spec = text if text == "all" or ":" in text else [int(part) for part in text.split(",")]
    assert resolve(spec, n_layers) == layers


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("5", 5),
        ("-1", -1),
        ("0.5", 0.5),
        ("all", "all"),
        ("2:6", "2:6"),
        ("3-5", "3:6"),
        ("1, 3-5,-1", [1, "3:6", -1]),
        ("0.25:0.75", "0.25:0.75"),
    ],
)
def test_layers_as_they_are_typed(text, spec):
    assert layers.spoken(text) == spec


@pytest.mark.parametrize("text", ["", "x", "1.5", "nan", "3-", "a-b", "1,,2"])
def test_what_is_typed_and_no_layer_is_said(text):
    with pytest.raises(LookupError, match="is no layer"):
        layers.spoken(text)
