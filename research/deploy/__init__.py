"""Deployment: a finalised network as integer codes, as a file of its own and as an ONNX graph, with proof of parity."""

from research.deploy.artifact import ArtifactReport, load_artifact, save_artifact
from research.deploy.biases import round_biases
from research.deploy.onnx import export_onnx
from research.deploy.parity import parity_report

__all__ = ["ArtifactReport", "export_onnx", "load_artifact", "parity_report", "round_biases", "save_artifact"]
