"""What sparse MoE, INT8 quantization and distillation cost and buy on the reader's own CPU."""

import os

# ONNX Runtime would tell its makers what it runs, and keep a file for it in the temporary folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# NumPy and SciPy multiply nothing large here, and where memory is short, making their threads may never end.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
