"""Small records for the tests of the table and of the plots."""

from mnist_lab.report.records import Measurement, Record


def make_measurement(test_acc: float = 0.98, size_mib: float = 1.0, b64: float | None = 2.0) -> Measurement:
    """A measurement timed at batch 64 only, or not at all."""
    return Measurement(
        version="1",
        file={"file": "x.onnx", "sha256": ""},
        test_acc=test_acc,
        test_loss=0.1,
        test_ece=0.01,
        train_acc=0.99,
        train_loss=0.05,
        size_mib=size_mib,
        file_mb=size_mib,
        bins={},
        confusion=[],
        same_class=1.0,
        largest_gap=0.0,
        threads=1,
        latency_ms={} if b64 is None else {"64": {"median_ms": b64, "q1_ms": b64, "q3_ms": b64, "num_calls": 9}},
    )


def make_record(model: str = "FFN_baseline", seed: int = 0, order: int = 0, **measurements: Measurement) -> Record:
    """A record without curves; an INT8 model is made from FFN_baseline."""
    is_int8 = model.endswith(("INT8", "PTQ"))
    return Record(
        model=model,
        technique="dense",
        precision="INT8" if is_int8 else "FP32",
        dataset="mnist",
        preset="compact",
        recipe="quick",
        seed=seed,
        order=order,
        config={},
        parent={"model": "FFN_baseline", "sha256": ""} if is_int8 else None,
        checkpoint={"file": f"{model}-seed{seed}.safetensors", "sha256": ""},
        artifact={"file": f"{model}-seed{seed}.onnx", "sha256": ""},
        params_total=10,
        params_active=10,
        validation_acc=0.98,
        validation_loss=0.1,
        train_seconds=1.0,
        train_threads=2,
        curves=[],
        machine={"cpu": "here"},
        versions={},
        measurements=measurements or {"onnxruntime": make_measurement()},
    )
