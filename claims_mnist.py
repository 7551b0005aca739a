"""Train what the usual claims need over several seeds, test every claim, and write the verdicts.

python claims_mnist.py --recipe quick       # minutes
python claims_mnist.py                      # the standard recipe: within an hour; finished seeds are not run again
"""

from dataclasses import dataclass

from mnist_lab.claims import Evidence, format_claims, settle_claims, write_claims
from mnist_lab.console import make_all, open_lab, print_checkpoints
from mnist_lab.evaluate import measure_latencies
from mnist_lab.options import Options, check_count
from mnist_lab.rows import claim_rows
from mnist_lab.scripts import run_script

TIMED = ("FFN_baseline", "FFN_PTQ_INT8", "Sparse_MoE", "Sparse_MoE_INT8", "Sparse_MoE_PTQ")


@dataclass(frozen=True)
class ClaimOptions(Options):
    seeds: int = 5
    """Number of seeds, from --seed upward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--seeds", self.seeds)


def main(options: ClaimOptions) -> None:
    seeds = range(options.seed, options.seed + options.seeds)
    with open_lab(options) as lab:
        jobs = [(row, seed) for seed in seeds for row in claim_rows(suffix=options.suffix)]
        print_checkpoints(lab, jobs)
        records = make_all(lab, jobs, mode="load")
        measure_latencies(lab, [(r, "onnxruntime") for r in records if r.model.removesuffix(options.suffix) in TIMED])
        findings = settle_claims(Evidence(lab.results, records, seeds, suffix=options.suffix))
        title = (
            f"Claims, tested: {lab.dataset.name}, {lab.preset} models, {lab.recipe_name} recipe, {options.seeds} seeds"
        )
        write_claims(lab.results, findings, title=title)
        print(f"\n{format_claims(findings)}\n\nwritten: {lab.results / 'claims.md'} and claims.json")


if __name__ == "__main__":
    run_script(main, ClaimOptions, __doc__)
