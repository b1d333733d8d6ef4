"""Turns results into cells of a labelled Zarr store that survives kills and is read by plain xarray."""

from nsteer.store.group import Group, Variable
from nsteer.store.records import Cell
from nsteer.store.store import Store
from nsteer.store.structure import LAYOUT
from nsteer.system.fingerprints import fingerprint
from nsteer.system.names import slug

__all__ = ["LAYOUT", "Cell", "Group", "Store", "Variable", "fingerprint", "slug"]
