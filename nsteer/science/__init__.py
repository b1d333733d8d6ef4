"""Pure functions of arrays: directions, separation, metrics, statistics, and where presets come from."""
