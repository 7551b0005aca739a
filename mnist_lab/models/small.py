"""The family of small students: pooled pixels, windows that share their weights, narrow hidden layers."""

from dataclasses import dataclass

from mnist_lab.data import DataSpec
from mnist_lab.models.ffn import FFNConfig, Windows


@dataclass(frozen=True)
class SmallShape:
    """Of a model from a few hundred to some 100,000 weights."""

    hidden: tuple[int, ...] = ()
    pool: int = 1
    windows: tuple[Windows, ...] = ()

    @property
    def name(self) -> str:
        """For example `pool2-w8x5s2-w16x3s2-h32`."""
        pool = [f"pool{self.pool}"] if self.pool > 1 else []
        windows = [f"w{own.name}" for own in self.windows]
        return "-".join([*pool, *windows, *(f"h{width}" for width in self.hidden)]) or "linear"

    def config(self, data: DataSpec) -> FFNConfig:
        """Of a model for this data.

        Raises:
            UserError: the shape does not fit its images.
        """
        return FFNConfig(self.hidden, data, pool=self.pool, windows=self.windows)
