"""Upkeep of stores: verify, repair, gc, diff, merge. Labels only: no model is loaded, no torch imported."""
