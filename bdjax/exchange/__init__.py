"""Networks from and to other frameworks: safetensors with torch's names, saved models, ONNX, black-box classifiers.

Nothing here runs code from a file; no pickle is read.
"""
