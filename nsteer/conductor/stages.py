"""The stages that take cells, by name: each fills what is missing of its groups for the model at hand."""

from __future__ import annotations

from collections.abc import Callable

from nsteer.conductor.calibrating import calibrate
from nsteer.conductor.capturing import capture
from nsteer.conductor.deriving import derive
from nsteer.conductor.judging import judge
from nsteer.conductor.measuring import measure
from nsteer.conductor.recording import record
from nsteer.conductor.session import Session
from nsteer.conductor.steering import steer
from nsteer.conductor.writing import write

STAGES: dict[str, Callable[[Session], None]] = {
    "samples": write,
    "activations": capture,
    "vectors": derive,
    "calibration": calibrate,
    "steering": steer,
    "measure": measure,
    "reads": record,
    "judged": judge,
}
