"""What each stage of `stages.table` does: fills what is missing of its groups for the current model."""

from __future__ import annotations

from collections.abc import Callable

from nsteer.runner.calibrating import calibrate, calibrate_edits
from nsteer.runner.capturing import capture
from nsteer.runner.deriving import derive
from nsteer.runner.directing import direct
from nsteer.runner.judging import judge
from nsteer.runner.measuring import anisotropy, lens, outcomes, outcomes_edited, outcomes_prompted, outcomes_unsteered
from nsteer.runner.model import ModelRun
from nsteer.runner.recording import edit, reads, streams
from nsteer.runner.rereading import embed, swap
from nsteer.runner.responding import respond, sift
from nsteer.runner.runs import Run
from nsteer.runner.steering import ask, leave, steer
from nsteer.runner.weighing import weigh, weigh_edits, weigh_unsteered
from nsteer.runner.writing import write

RUN: dict[str, Callable[[ModelRun], None]] = {
    "samples": write,
    "activations": capture,
    "embeddings": embed,
    "swapped": swap,
    "vectors": derive,
    "responses": respond,
    "responses_judged": sift,
    "directions": direct,
    "calibration": calibrate,
    "unsteered": leave,
    "prompted": ask,
    "steering": steer,
    "outcomes": outcomes,
    "outcomes_unsteered": outcomes_unsteered,
    "outcomes_prompted": outcomes_prompted,
    "capability_unsteered": weigh_unsteered,
    "capability": weigh,
    "lens": lens,
    "anisotropy": anisotropy,
    "calibration_edits": calibrate_edits,
    "reads": reads,
    "streams": streams,
    "edited": edit,
    "outcomes_edited": outcomes_edited,
    "capability_edited": weigh_edits,
}
"""In a model's turn."""

RUN_LAST: dict[str, Callable[[Run], None]] = {"judged": judge}
"""Once, after the last model: of all models."""
