"""What the benchmarks of trained models share: their options, and the models themselves."""

from dataclasses import dataclass
from pathlib import Path

from mnist_lab.data import DatasetName
from mnist_lab.models import PresetName
from mnist_lab.options import Options
from mnist_lab.training import RecipeName


@dataclass(frozen=True)
class BenchmarkOptions:
    """Which models; those that are not there are trained. Each benchmark sets threads and batch sizes itself."""

    preset: PresetName = "compact"
    """Set of architectures."""
    recipe: RecipeName = "quick"
    """Training budget: speed does not depend on it, but how the router spreads the images does."""
    dataset: DatasetName | None = None
    """Data set; when not given, MNIST, or the bundled digits where MNIST can be neither found nor downloaded."""
    data_dir: Path | None = None
    """Folder that holds MNIST/raw/ and the like; when not given, $MNIST_LAB_DATA, else ./data (downloaded into)."""
    seed: int = 0
    """Seed of the models."""
    checkpoints: Path = Path("checkpoints")
    """Folder for trained and converted models."""
    results: Path = Path("results")
    """Folder for records and for the benchmark's table and plot."""

    def suite_options(self, *runtimes: str) -> Options:
        """The same for the suite, measuring in these runtimes.

        Raises:
            UserError: the seed is out of range.
        """
        fields = {name: getattr(self, name) for name in BenchmarkOptions.__dataclass_fields__}
        return Options(**fields, runtime=runtimes)  # type: ignore[arg-type]
