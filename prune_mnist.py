"""Leave something out of a trained model, train the rest a little more, and measure it beside the original.

python prune_mnist.py weights                          # four of five weights of the MoE become zero
python prune_mnist.py weights --model ffn --ratio 0.95 --criterion wanda
python prune_mnist.py neurons --ratio 0.5              # layers of half the width
python prune_mnist.py router --ratio 0.5               # half of the gate's weights become zero
python prune_mnist.py experts --keep 1                 # the MoE's best expert becomes a dense FFN
python prune_mnist.py experts --keep 2 --criterion exact
python prune_mnist.py merge --keep 2 --group outputs   # experts that resemble each other become one
python prune_mnist.py shared-base --rank 8             # what experts have in common is stored once

Over three seeds with --teacher self, in points of accuracy against the MoE itself,
expect 90 % zeros −0.02 ± 0.01, half the width −0.02 ± 0.16, one expert +0.02 ± 0.07
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import subcommand

from mnist_lab.command.console import make_and_print, open_lab, print_proof
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options
from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.merge_experts import MergeExperts, Merging
from mnist_lab.compress.prune_experts import ExpertPruning, PruneExperts, check_experts, check_keep
from mnist_lab.compress.prune_neurons import NeuronPruning, PruneNeurons
from mnist_lab.compress.prune_router import PruneRouter
from mnist_lab.compress.prune_weights import PruneWeights, WeightPruning
from mnist_lab.compress.share_base import ShareBase, Sharing
from mnist_lab.errors import UserError
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    SOURCES,
    SourceName,
    merged_experts,
    pruned_experts,
    pruned_neurons,
    pruned_router,
    pruned_weights,
    shared_base,
)
from mnist_lab.experiments.run import Run
from mnist_lab.models.moe import RoutingConfig


@dataclass(frozen=True)
class WeightOptions(Options):
    """Set the weights that matter least to zero."""

    model: SourceName = "moe"
    """Trained model to prune; student is KD_FFN_Student."""
    pruning: WeightPruning = field(default_factory=WeightPruning)
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pruning.allocation != "even" and self.model != "moe":
            raise UserError(
                f"--allocation {self.pruning.allocation} shares out among experts, and {self.model} has none"
            )

    @property
    def row(self) -> Row:
        return pruned_weights(SOURCES[self.model], PruneWeights(self.pruning, self.finetuning))


@dataclass(frozen=True)
class NeuronOptions(Options):
    """Take the hidden units that matter least out of every layer."""

    model: SourceName = "moe"
    """Trained model to prune; student is KD_FFN_Student."""
    pruning: NeuronPruning = field(default_factory=NeuronPruning)
    finetuning: Finetuning = field(default_factory=Finetuning)

    @property
    def row(self) -> Row:
        return pruned_neurons(SOURCES[self.model], PruneNeurons(self.pruning, self.finetuning))


@dataclass(frozen=True)
class RouterOptions(Options):
    """Set the weights of the MoE's gate that matter least to zero."""

    pruning: PruneRouter = field(default_factory=PruneRouter)

    @property
    def row(self) -> Row:
        return pruned_router(self.pruning)


@dataclass(frozen=True)
class ExpertOptions(Options):
    """Take the experts that matter least out of the MoE."""

    pruning: ExpertPruning = field(default_factory=ExpertPruning)
    train: Literal["all", "router"] = "all"
    """What is trained afterwards."""
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(RoutingConfig().num_experts, self.pruning)
        self.row  # noqa: B018

    @property
    def row(self) -> Row:
        return pruned_experts(PruneExperts(self.pruning, self.train, self.finetuning))


@dataclass(frozen=True)
class MergeOptions(Options):
    """Let experts of the MoE that resemble each other become one."""

    merging: Merging = field(default_factory=Merging)
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.merging.keep, RoutingConfig().num_experts)

    @property
    def row(self) -> Row:
        return merged_experts(MergeExperts(self.merging, self.finetuning))


@dataclass(frozen=True)
class SharedBaseOptions(Options):
    """Store what the MoE's experts have in common once, and of each what it adds, in low rank."""

    sharing: Sharing = field(default_factory=Sharing)
    finetuning: Finetuning = field(default_factory=Finetuning)

    @property
    def row(self) -> Row:
        return shared_base(ShareBase(self.sharing, self.finetuning))


PruneOptions = (
    Annotated[WeightOptions, subcommand("weights")]
    | Annotated[NeuronOptions, subcommand("neurons")]
    | Annotated[RouterOptions, subcommand("router")]
    | Annotated[ExpertOptions, subcommand("experts")]
    | Annotated[MergeOptions, subcommand("merge")]
    | Annotated[SharedBaseOptions, subcommand("shared-base")]
)


def main(
    options: WeightOptions | NeuronOptions | RouterOptions | ExpertOptions | MergeOptions | SharedBaseOptions,
) -> None:
    row = options.row
    assert row.source is not None
    with open_lab(options) as lab:
        source = Run(lab, row.source, options.seed)
        print_proof(make_and_print(Run(lab, row, options.seed), beside=source))


if __name__ == "__main__":
    run_script(main, PruneOptions, __doc__)  # type: ignore[arg-type]
