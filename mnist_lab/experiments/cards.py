"""The JSON beside a run's artifact, from its record."""

from mnist_lab.deploy.artifacts import read_onnx
from mnist_lab.deploy.card import CENTRED, PREPARATIONS, Accuracy, Card, depends_on_batch, features_needed, save_card
from mnist_lab.deploy.onnx import interface_of
from mnist_lab.experiments.run import Run
from mnist_lab.report.records import Measurement, Record


def ensure_card(run: Run, record: Record) -> None:
    """See that what is known of a run's artifact lies beside it, as its record says.

    Raises:
        UserError: what lies there is no file.
        RunFailed: the folder cannot be written.
    """
    graph = read_onnx(run.artifact).graph
    card = Card(
        file=run.artifact.name,
        sha256=record.artifact["sha256"],
        interface=interface_of(run.lab.dataset.spec),
        preparation=PREPARATIONS[record.dataset in CENTRED],
        cpu_features=features_needed(graph),
        depends_on_batch=depends_on_batch(graph),
        model=record.model,
        technique=record.technique,
        precision=record.precision,
        dataset=record.dataset,
        preset=record.preset,
        recipe=record.recipe,
        seed=record.seed,
        accuracy=_accuracy(run, record),
        parents={**record.parents},
    )
    save_card(run.artifact, card)


def _accuracy(run: Run, record: Record) -> dict[str, Accuracy]:
    """On validation, and on test: of the artifact, or where only other files of the run were measured, of these."""
    runtime, test = _tested(record)
    num_test = sum(map(sum, test.confusion))
    validated_in = run.row.form.runtimes[0]
    found = {
        "test": Accuracy(accuracy=test.test_acc, num_images=num_test, runtime=runtime),
        "validation": Accuracy(
            accuracy=record.validation_acc, num_images=len(run.lab.dataset.validation), runtime=validated_in
        ),
    }
    if test.test_acc_b1 is not None:
        found["test, one by one"] = Accuracy(accuracy=test.test_acc_b1, num_images=num_test, runtime=runtime)
    return found


def _tested(record: Record) -> tuple[str, Measurement]:
    measured = list(record.measurements.items())
    of_artifact = (pair for pair in measured if pair[1].file["file"] == record.artifact["file"])
    return next(of_artifact, measured[0])
