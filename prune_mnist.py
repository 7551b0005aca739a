"""Leave something out of a trained model, train the rest a little more, and measure it beside the original.

python prune_mnist.py weights                          # four of five weights of the MoE become zero
python prune_mnist.py weights --model ffn --ratio 0.95 --criterion wanda
python prune_mnist.py neurons --ratio 0.5              # layers of half the width
python prune_mnist.py router --ratio 0.5               # half of the gate's weights become zero
python prune_mnist.py experts --keep 1                 # the MoE's best expert becomes a dense FFN
python prune_mnist.py experts --keep 2 --criterion exact
python prune_mnist.py merge --keep 2 --group outputs   # experts that resemble each other become one
python prune_mnist.py shared-base --rank 8             # what experts have in common is stored once
python prune_mnist.py experts --source Sparse_MoE-E8   # any trained row, by the name of its checkpoint

Over three seeds with --teacher self, in points of accuracy against the MoE itself,
expect 90 % zeros −0.02 ± 0.01, half the width −0.02 ± 0.16, one expert +0.02 ± 0.07
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import subcommand

from mnist_lab.command.console import make_and_print, open_lab, print_proof
from mnist_lab.command.entry import run_script
from mnist_lab.command.source import ModelOptions, SourceOptions, start
from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.merge_experts import MergeExperts, Merging
from mnist_lab.compress.prune_experts import ExpertPruning, PruneExperts
from mnist_lab.compress.prune_neurons import NeuronPruning, PruneNeurons
from mnist_lab.compress.prune_router import PruneRouter
from mnist_lab.compress.prune_weights import PruneWeights, WeightPruning
from mnist_lab.compress.share_base import ShareBase, Sharing
from mnist_lab.errors import UserError
from mnist_lab.experiments.pipeline import Chain, advance
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    merged_experts,
    pruned_experts,
    pruned_neurons,
    pruned_router,
    pruned_weights,
    shared_base,
)


@dataclass(frozen=True)
class WeightOptions(ModelOptions):
    """Set the weights that matter least to zero."""

    pruning: WeightPruning = field(default_factory=WeightPruning)
    finetuning: Finetuning = field(default_factory=Finetuning)

    def row_from(self, source: Chain) -> Row:
        if self.pruning.allocation != "even" and source.num_experts == 1:
            raise UserError(
                f"--allocation {self.pruning.allocation} shares out among experts, and {self.source_name} has none"
            )
        step = PruneWeights(self.pruning, self.finetuning)
        advance(source, step)
        return pruned_weights(source.last, step)


@dataclass(frozen=True)
class NeuronOptions(ModelOptions):
    """Take the hidden units that matter least out of every layer."""

    pruning: NeuronPruning = field(default_factory=NeuronPruning)
    finetuning: Finetuning = field(default_factory=Finetuning)

    def row_from(self, source: Chain) -> Row:
        step = PruneNeurons(self.pruning, self.finetuning)
        advance(source, step)
        return pruned_neurons(source.last, step)


@dataclass(frozen=True)
class RouterOptions(SourceOptions):
    """Set the weights of a mixture's gate that matter least to zero."""

    pruning: PruneRouter = field(default_factory=PruneRouter)

    def row_from(self, source: Chain) -> Row:
        advance(source, self.pruning)
        return pruned_router(self.pruning, source.last)


@dataclass(frozen=True)
class ExpertOptions(SourceOptions):
    """Take the experts that matter least out of a mixture."""

    pruning: ExpertPruning = field(default_factory=ExpertPruning)
    train: Literal["all", "router"] = "all"
    """What is trained afterwards."""
    finetuning: Finetuning = field(default_factory=Finetuning)

    def row_from(self, source: Chain) -> Row:
        step = PruneExperts(self.pruning, self.train, self.finetuning)
        advance(source, step)
        return pruned_experts(step, source.last)


@dataclass(frozen=True)
class MergeOptions(SourceOptions):
    """Let experts of a mixture that resemble each other become one."""

    merging: Merging = field(default_factory=Merging)
    finetuning: Finetuning = field(default_factory=Finetuning)

    def row_from(self, source: Chain) -> Row:
        step = MergeExperts(self.merging, self.finetuning)
        advance(source, step)
        return merged_experts(step, source.last)


@dataclass(frozen=True)
class SharedBaseOptions(SourceOptions):
    """Store what a mixture's experts have in common once, and of each what it adds, in low rank."""

    sharing: Sharing = field(default_factory=Sharing)
    finetuning: Finetuning = field(default_factory=Finetuning)

    def row_from(self, source: Chain) -> Row:
        step = ShareBase(self.sharing, self.finetuning)
        advance(source, step)
        return shared_base(step, source.last)


PruneOptions = (
    Annotated[WeightOptions, subcommand("weights")]
    | Annotated[NeuronOptions, subcommand("neurons")]
    | Annotated[RouterOptions, subcommand("router")]
    | Annotated[ExpertOptions, subcommand("experts")]
    | Annotated[MergeOptions, subcommand("merge")]
    | Annotated[SharedBaseOptions, subcommand("shared-base")]
)


def main(options: SourceOptions) -> None:
    with open_lab(options) as lab:
        lab, source, row = start(lab, options)
        for record in make_and_print(lab, row, options.all_seeds, beside=source):
            print_proof(record)


if __name__ == "__main__":
    run_script(main, PruneOptions, __doc__)  # type: ignore[arg-type]
