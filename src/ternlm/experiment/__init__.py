"""Experiments: one file from a corpus to a trained, measured and heard model. No torch at import time."""

from ternlm.experiment.definition import Experiment, load_experiment
from ternlm.experiment.record import STAGES, ExperimentDirectory

__all__ = ["STAGES", "Experiment", "ExperimentDirectory", "load_experiment"]
