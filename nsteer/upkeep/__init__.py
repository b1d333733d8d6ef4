"""Upkeep of stores: verify, repair, gc, diff, merge, migrate. Labels only: no model is loaded, no torch imported."""
