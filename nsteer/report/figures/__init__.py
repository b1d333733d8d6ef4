"""Turns labelled results into figures: a Dataset in, a `matplotlib.figure.Figure` out, each by itself.

    measured = separation.measure(results["activations", "zoo/llama"].pooled)
    nsteer.report.figures.layer_curves(measured).savefig("curves.png")
    for picture in nsteer.report.figures.pictures(results): ...        # all that a store has to show, with captions

No pyplot, so nothing is kept or shown behind one's back; no model is needed. What is missing is said on the figure.
"""

from nsteer.report.figures.curves import anisotropy, layer_curves
from nsteer.report.figures.gather import Picture, pictures
from nsteer.report.figures.geometry import plane, rsa, similarity
from nsteer.report.figures.responses import confusion, dose_response, receipts, scenarios, script_shares
from nsteer.report.figures.style import svg

__all__ = [
    "Picture",
    "anisotropy",
    "confusion",
    "dose_response",
    "layer_curves",
    "pictures",
    "plane",
    "receipts",
    "rsa",
    "scenarios",
    "script_shares",
    "similarity",
    "svg",
]
