"""Distil a student that never sees a 3, and count how many threes it recognises (Hinton et al. 2015, §3).

python dark_knowledge_mnist.py              # two seeds: expect 93 % of the threes, 98 % with the bias corrected
"""

from dataclasses import dataclass, replace

import torch

from mnist_lab.command.console import print_notice, use_allowed_cpus
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import DataOptions, check_count, check_device, seeds_from
from mnist_lab.data import load_dataset
from mnist_lab.errors import UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.files import write_text
from mnist_lab.folders import only_run_in
from mnist_lab.studies.dark_knowledge import (
    LEFT_OUT,
    STUDENT_RECIPE,
    TEACHER_RECIPE,
    format_dark_knowledge,
    paper_rows,
    run_seed,
    save_dark_knowledge,
)
from mnist_lab.training import find_recipe


@dataclass(frozen=True)
class DarkKnowledgeOptions(DataOptions):
    seeds: int = 2
    """Number of seeds, from --seed upward; finished models are not trained again."""
    epochs: int | None = None
    """Passes over the training images of teacher and students, in place of 30 and 20."""
    device: str = "cpu"
    """Device for training, by torch's name (cpu, cuda)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seeds_from(self.seed, self.seeds)
        check_count("--epochs", self.epochs)
        check_device(self.device)


def main(options: DarkKnowledgeOptions) -> None:
    use_allowed_cpus()
    dataset = load_dataset(options.dataset, options.data_dir, options.height_and_width)
    if dataset.spec.num_classes <= LEFT_OUT:
        raise UserError(f"{dataset.name} has {dataset.spec.num_classes} classes; one is left out, the fourth")
    name = f"{dataset.name}-dark-knowledge" + ("" if options.epochs is None else f"-epochs{options.epochs}")
    results = options.results / name
    recipe = find_recipe("standard", "compact")  # its rows bring their own
    lab = Lab(
        dataset=dataset,
        preset_name="compact",
        recipe_name="standard",
        recipe=recipe,
        checkpoints=options.checkpoints / name,
        results=results,
        device=options.device,
        train_threads=torch.get_num_threads(),  # of all seeds, which the table sets side by side
    )
    with only_run_in(lab.checkpoints, wait=options.wait), only_run_in(results, wait=options.wait):
        run_seeds(options, lab)


def run_seeds(options: DarkKnowledgeOptions, lab: Lab) -> None:
    """Every seed's outcome, in a table beside the paper's."""
    results = lab.results
    print_notice(lab.dataset.notice)
    rows = paper_rows(
        replace(TEACHER_RECIPE, epochs=options.epochs or TEACHER_RECIPE.epochs),
        replace(STUDENT_RECIPE, epochs=options.epochs or STUDENT_RECIPE.epochs),
    )
    runs = [run_seed(lab, rows, seed) for seed in seeds_from(options.seed, options.seeds)]
    text = format_dark_knowledge(runs, left_out=lab.dataset.spec.class_names[LEFT_OUT])
    save_dark_knowledge(results / "dark_knowledge.json", runs)
    write_text(results / "dark_knowledge.md", f"# Dark knowledge\n\n{text}\n")
    print(f"\n{text}\n\nwritten: {results / 'dark_knowledge.md'} and .json")


if __name__ == "__main__":
    run_script(main, DarkKnowledgeOptions, __doc__)
