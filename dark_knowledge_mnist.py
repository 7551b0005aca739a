"""Distil a student that never sees a 3, and count how many threes it recognises (Hinton et al. 2015, §3).

python dark_knowledge_mnist.py              # two seeds; finished models are not trained again
"""

import json
from dataclasses import asdict, dataclass, replace

from mnist_lab.dark_knowledge import STUDENT_RECIPE, TEACHER_RECIPE, format_dark_knowledge, run_seed
from mnist_lab.data import load_dataset
from mnist_lab.files import ensure_writable, write_atomically
from mnist_lab.options import DataOptions, check_count, check_device
from mnist_lab.scripts import run_script


@dataclass(frozen=True)
class DarkKnowledgeOptions(DataOptions):
    seeds: int = 2
    """Number of seeds, from --seed upward."""
    epochs: int | None = None
    """Passes over the training images of teacher and students, in place of 30 and 20."""
    device: str = "cpu"
    """Device for training, by torch's name (cpu, cuda)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--seeds", self.seeds)
        check_count("--epochs", self.epochs)
        check_device(self.device)


def main(options: DarkKnowledgeOptions) -> None:
    dataset = load_dataset(options.dataset, options.data_dir)
    name = f"{dataset.name}-dark-knowledge"
    checkpoints, results = options.checkpoints / name, options.results / name
    ensure_writable(checkpoints)
    ensure_writable(results)
    if dataset.notice:
        print(f"\nNOTE: {dataset.notice}\n", flush=True)
    runs = [
        run_seed(
            dataset,
            checkpoints,
            seed,
            teacher_recipe=replace(TEACHER_RECIPE, epochs=options.epochs or TEACHER_RECIPE.epochs),
            student_recipe=replace(STUDENT_RECIPE, epochs=options.epochs or STUDENT_RECIPE.epochs),
            device=options.device,
        )
        for seed in range(options.seed, options.seed + options.seeds)
    ]
    text = format_dark_knowledge(runs)
    fields = [asdict(run) | {"errors": {role: e._asdict() for role, e in run.errors.items()}} for run in runs]
    write_atomically(results / "dark_knowledge.json", lambda path: path.write_text(json.dumps(fields, indent=1) + "\n"))
    write_atomically(results / "dark_knowledge.md", lambda path: path.write_text(f"# Dark knowledge\n\n{text}\n"))
    print(f"\n{text}\n\nwritten: {results / 'dark_knowledge.md'} and .json")


if __name__ == "__main__":
    run_script(main, DarkKnowledgeOptions, __doc__)
