"""Steered models and stored continuations in the tools that evaluate models: Inspect, and lm-eval's harness.

`steered` puts a vector of a store on a model for good, `inspect` and `harness` hand such a model to either, `logs`
writes what a store holds as eval logs of Inspect. What either package brings is imported where it is used.
"""
