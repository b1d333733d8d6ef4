"""Small things that a newcomer meets: netCDF, reports that are no difference, files that are no store."""

from __future__ import annotations

import shutil

import pytest
import xarray as xr
from test_cluster import GENERAL
from test_exchange import make
from test_runner import STEER, invoke, write
from test_shards import CALIBRATED

import nsteer
from nsteer.plan import check
from nsteer.report import shown
from nsteer.report.texts import NONE, Texts
from nsteer.stages import arrays
from nsteer.stages.products import PRODUCTS, product_of
from nsteer.store import Store


def test_every_group_can_be_written_as_netcdf(folder, tmp_path):
    """Of a plan that asks for everything: structure, labels, attributes and types of all groups, before any cell."""
    entry = {
        **CALIBRATED,
        "generate": {"max_new_tokens": 4},
        "project": True,
        "also": [{"op": "add", "direction": "joy"}],
    }
    steer = [*STEER, entry]
    study = check.load(write(tmp_path, folder("llama"), steer=steer, **GENERAL))
    store = Store(study.plan.store)
    store.prepare([*arrays.groups(study), arrays.failures_group(["a"]), arrays.programs_group(["b"])])
    store.add_run(plan="name: x", environment={}, started="now", argv=[])
    results = nsteer.open(study.plan.store)
    assert len(list(results)) > 20
    for path in results:
        results[path].to_netcdf(tmp_path / "one.nc")
        with xr.open_dataset(tmp_path / "one.nc") as back:
            assert dict(back.sizes).items() >= {d: n for d, n in results[path].sizes.items() if n}.items()


def test_what_a_report_made_is_no_difference(tmp_path):
    store = make(tmp_path / "one.zarr", "zoo/llama")
    shutil.copytree(store, tmp_path / "two.zarr")
    assert invoke("report", tmp_path / "two.zarr", "--claims").exit_code == 0
    there = set(Store(tmp_path / "two.zarr").groups()) - set(Store(store).groups())
    assert there and all(product_of(path).reported or product_of(path).diary for path in there)
    assert invoke("diff", store, tmp_path / "two.zarr").exit_code == 0
    assert all(kind.reported for path, kind in PRODUCTS.items() if path.startswith("summary/"))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("s.zip", "unpack it"),
        ("s.zarr.tar.gz", "unpack it"),
        ("s.nc", "xarray.open_dataset"),
        ("s.h5", "open_datatree"),
    ],
)
def test_a_file_in_place_of_a_store_says_what_to_do(name, advice, tmp_path):
    (tmp_path / name).write_bytes(b"PK")
    said = invoke("ls", tmp_path / name)
    assert said.exit_code == 1 and advice in said.stderr and "nothing was written" in said.stderr


def test_texts_that_changed_are_shown_before_those_that_did_not():
    import numpy as np

    same, other = "the rain", "the sun"
    texts = [same, same, same, other, same, same]
    page_texts = Texts(
        {"control": ["none"], **{dim: ["a"] for dim in (*shown.FILTERS, *shown.REST) if dim != "control"}},
        {name: np.zeros(6, int) for name in (*shown.FILTERS, *shown.REST, "unsteered")} | {"named": np.full(6, NONE)},
        {},
        texts,
        [[same, -1, 0.0]],
    )
    assert shown.changed(page_texts).tolist() == [text == other for text in texts]
