"""Deployment: a finalised network as integer codes, as a file of its own and as an ONNX graph, with proof of parity."""
