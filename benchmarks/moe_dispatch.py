"""Time the MoE's sorted dispatch in PyTorch against the mask loop, by turns, on random pixels.

python -m benchmarks.moe_dispatch
"""

import functools

import torch

from benchmarks.mask_loop import mask_loop_forward
from mnist_lab.evaluate import torch_threads
from mnist_lab.measure import measure_latency
from mnist_lab.models import PRESETS, build_model
from mnist_lab.models.moe import RoutingConfig, SparseMoE

BATCHES = (1, 64, 1024)
NUM_ROUNDS = 15


def main() -> None:
    torch.manual_seed(0)
    with torch_threads(1), torch.inference_mode():
        print("one thread, compact preset; median milliseconds [quartiles]")
        for batch in BATCHES:
            model = build_model(PRESETS["compact"].moe(0.13, 0.31, RoutingConfig())).eval()
            assert isinstance(model, SparseMoE)
            pixels = torch.rand(batch, 1, 28, 28)
            calls = {
                "sorted dispatch": functools.partial(model, pixels),
                "mask loop": functools.partial(mask_loop_forward, model, pixels),
            }
            latencies = measure_latency(calls, num_rounds=NUM_ROUNDS)
            for name, latency in latencies.items():
                print(
                    f"batch {batch:5d}  {name:16s} {latency.median_ms:8.3f} [{latency.q1_ms:.3f}, {latency.q3_ms:.3f}]"
                )
            ratio = latencies["mask loop"].median_ms / latencies["sorted dispatch"].median_ms
            print(f"batch {batch:5d}  speed-up {ratio:.2f}")


if __name__ == "__main__":
    main()
