"""The stages that take cells, by name: each fills what is missing of its groups for the model at hand."""

from __future__ import annotations

from collections.abc import Callable

from nsteer.runner.calibrating import calibrate
from nsteer.runner.capturing import capture
from nsteer.runner.deriving import derive
from nsteer.runner.judging import judge
from nsteer.runner.measuring import measure
from nsteer.runner.recording import record
from nsteer.runner.session import Session
from nsteer.runner.steering import steer
from nsteer.runner.writing import write

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
