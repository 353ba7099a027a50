"""Deployment: the ONNX graph, its checks, and inference on ONNX Runtime without torch."""
