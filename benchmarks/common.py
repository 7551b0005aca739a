"""What the benchmarks of trained models share: their options, and the models themselves."""

from dataclasses import dataclass

from mnist_lab.models import PresetName
from mnist_lab.command.options import DataOptions, Options
from mnist_lab.training import RecipeName


@dataclass(frozen=True)
class BenchmarkOptions(DataOptions):
    """Which models; those that are not there are trained. Each benchmark sets threads and batch sizes itself."""

    preset: PresetName = "compact"
    """Set of architectures."""
    recipe: RecipeName = "quick"
    """Training budget: speed does not depend on it, but how the router spreads the images does."""

    def suite_options(self, *runtimes: str) -> Options:
        """The same for the suite, measuring in these runtimes.

        Raises:
            UserError: the seed is out of range.
        """
        fields = {name: getattr(self, name) for name in BenchmarkOptions.__dataclass_fields__}
        return Options(**fields, runtime=runtimes)  # type: ignore[arg-type]
