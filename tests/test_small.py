"""Small students: pooled pixels and windows that share weights, in PyTorch."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_expert_shapes import APART
from tiny import spec

from mnist_lab.compress.adapters import Adapters, add_adapters
from mnist_lab.compress.adapters import fold as fold_adapters
from mnist_lab.compress.fake_quant import RoundedActivations, fold, round_in_training, roundings
from mnist_lab.compress.layer_by_layer import layer_objective
from mnist_lab.compress.levels import Rounding, on_levels
from mnist_lab.compress.prune_weights import importance, weight_matrices
from mnist_lab.compress.train import no_larger
from mnist_lab.deploy.onnx import stored_bytes
from mnist_lab.errors import UserError
from mnist_lab.files import as_json
from mnist_lab.models import build_model, config_from_dict, count_parameters, parameter_bytes
from mnist_lab.models.checkpoints import load_checkpoint, save_checkpoint
from mnist_lab.models.ffn import FFN, FFNConfig, WindowLayer, Windows, find_planes, linear_layers
from mnist_lab.models.moe import SparseMoE
from mnist_lab.models.small import SmallShape
from mnist_lab.models.surgery import hidden_shapes, masked_logits, with_units
from mnist_lab.runtimes.torch_sparse import SparseNetwork
from mnist_lab.training import Batch, sum_terms

SHAPE = SmallShape((16,), 2, (Windows(4, 5, 2), Windows(6, 2, 1)))
PIXELS = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def make_small(shape: SmallShape = SHAPE) -> FFN:
    torch.manual_seed(0)
    model = FFN(shape.config(spec()))
    with torch.no_grad():
        for layer in linear_layers(model.layers):
            layer.bias.normal_()
    return model.eval()


def convolve_by_hand(planes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Σ over a window's inputs, one window of one image at a time."""
    size, stride = windows.size, windows.stride
    rows = range(0, planes.shape[2] - size + 1, stride)
    columns = range(0, planes.shape[3] - size + 1, stride)
    sums = torch.empty(len(planes), windows.channels, len(rows), len(columns))
    for image in range(len(planes)):
        for i, top in enumerate(rows):
            for j, left in enumerate(columns):
                window = planes[image, :, top : top + size, left : left + size].flatten()
                sums[image, :, i, j] = weight @ window + bias
    return sums


def test_windows_see_the_means_of_pixels_and_share_their_weights() -> None:
    model = make_small()
    pooled = PIXELS.view(7, 1, 14, 2, 14, 2).mean(dim=(3, 5))
    planes = (pooled - model.normalize.mean) / model.normalize.std
    layers = list(linear_layers(model.layers))
    for layer, windows in zip(layers, SHAPE.windows, strict=False):
        planes = convolve_by_hand(planes, layer.weight, layer.bias, windows).relu()
    hidden = layers[2](planes.flatten(1)).relu()
    with torch.inference_mode():
        torch.testing.assert_close(model(PIXELS), layers[3](hidden), atol=1e-4, rtol=1e-4)
    assert [tuple(planes.shape[1:])] == find_planes(spec(), SHAPE.pool, SHAPE.windows)[-1:]
    assert count_parameters(model)[0] == 4 * 26 + 6 * 17 + (16 * 6 * 16 + 16) + 170


def test_windows_begin_as_he_says() -> None:
    torch.manual_seed(0)
    (layer,) = list(linear_layers(FFN(SmallShape((), 1, (Windows(400, 5, 4),)).config(spec())).layers))[:1]
    assert layer.weight.std().item() == pytest.approx((2 / 25) ** 0.5, rel=0.05)
    assert not layer.bias.any()


def test_tools_that_trace_see_linear_layers_of_the_same_outputs() -> None:
    model = make_small()
    first = model.layers[0]
    assert isinstance(first, WindowLayer)
    rows = model.normalize(PIXELS)
    torch.testing.assert_close(first.join(first.linear(first.split(rows))), first(rows), atol=1e-5, rtol=1e-5)
    exported = torch.export.export(model, (PIXELS[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(PIXELS), model(PIXELS), atol=1e-5, rtol=1e-5)
    operators = {str(node.target) for node in exported.graph.nodes}
    assert "aten.linear.default" in operators
    assert not any("conv" in operator for operator in operators)


def test_mixtures_pool_as_well() -> None:
    torch.manual_seed(0)
    model = SparseMoE(replace(APART, data=spec(), pool=2)).eval()
    blocks = PIXELS.view(7, 1, 14, 2, 14, 2).mean(dim=(3, 5), keepdim=True).expand(-1, -1, -1, 2, -1, 2)
    torch.testing.assert_close(model(blocks.reshape(PIXELS.shape)), model(PIXELS), atol=1e-5, rtol=1e-5)
    assert model.stem.weight.shape[1] == 196


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (SmallShape((8,), 3), "--pool 3 must divide the sides of an image, 28 and 28"),
        (SmallShape((), 4, (Windows(8, 8, 1),)), "--windows 8x8s1 is larger than the 7x7 pixels"),
        (SmallShape((), 1, (Windows(4, 5, 3), Windows(4, 9, 1))), "--windows 4x9s1 is larger than the 8x8 pixels"),
        (SmallShape((), 1, (Windows(1000, 1, 1),)), "--windows 1000x1s1 makes 784,000 values"),
    ],
)
def test_shapes_that_fit_no_image_are_refused(shape: SmallShape, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shape.config(spec())


def test_files_of_before_load_and_small_ones_too(tmp_path: Path) -> None:
    old = asdict(FFNConfig((8,), spec()))
    for field in ("pool", "windows"):
        del old[field]
    assert config_from_dict(as_json(old)) == FFNConfig((8,), spec())
    apart = asdict(APART)
    del apart["pool"]
    assert config_from_dict(as_json(apart)) == APART
    model = make_small()
    save_checkpoint(tmp_path / "small.safetensors", model, {})
    loaded = load_checkpoint(tmp_path / "small.safetensors").model
    torch.testing.assert_close(loaded(PIXELS), model(PIXELS), atol=0, rtol=0)
    assert {"normalize.mean", "normalize.std", "layers.2.weight"} <= model.state_dict().keys()


def test_names_of_shapes_tell_them_apart() -> None:
    assert SmallShape((32,), 2, (Windows(8, 5, 2), Windows(16, 3, 2))).name == "pool2-w8x5s2-w16x3s2-h32"
    assert SmallShape((64, 32)).name == "h64-h32"
    assert SmallShape().name == "linear"


def test_windows_learn_in_few_bits() -> None:
    model, rounding = make_small().train(), Rounding(2)
    weights = roundings(model, rounding, None)
    assert [weight.module for weight, _ in weights] == list(linear_layers(model.layers))
    assert [own.bits for _, own in weights] == [2, 2, 2, 4]
    for weight, own in weights:
        round_in_training(weight, own, as_int8=False)
    with RoundedActivations(8) as mode:
        model(PIXELS).sum().backward()
    assert mode.num_products == 4
    assert all(parameter.grad is not None for parameter in model.parameters())
    fold(model)
    for weight, own in weights:
        assert on_levels(weight.matrices()[0].numpy(), own) is not None


def test_layer_by_layer_counts_every_window() -> None:
    model, twin = make_small(), make_small()
    with torch.no_grad():
        next(linear_layers(model.layers)).weight.mul_(1.1)
    batch = Batch(PIXELS, torch.zeros(7, dtype=torch.int64), torch.arange(7))
    terms = layer_objective(twin)(model, batch).terms
    assert len(terms) == 4
    assert sum_terms(terms).item() > 0


def test_weights_of_windows_may_be_pruned_and_skipped() -> None:
    model = make_small()
    matrices = weight_matrices(model)
    assert [matrix.of(model.get_parameter(matrix.parameter)).shape[0] for matrix in matrices] == [25, 16, 96, 16]
    scale = importance(model, "wanda", PIXELS)
    assert [len(scale[matrix]) for matrix in matrices] == [25, 16, 96, 16]
    torch.testing.assert_close(SparseNetwork(model)(PIXELS), model(PIXELS), atol=1e-4, rtol=1e-4)


def test_units_of_dense_layers_may_go_and_channels_stay() -> None:
    model = make_small()
    assert hidden_shapes(model) == {"layers.2": (16,)}
    kept = torch.arange(0, 16, 2)
    masks = {"layers.2": torch.zeros(16).index_fill(0, kept, 1)}
    smaller = with_units(model, {"layers.2": [kept]})
    torch.testing.assert_close(smaller(PIXELS), masked_logits(model, PIXELS, masks), atol=1e-4, rtol=1e-4)
    assert smaller.config == SmallShape((8,), 2, SHAPE.windows).config(spec())


def test_adapters_stand_beside_weights_of_windows() -> None:
    model = make_small()
    network = add_adapters(model, Adapters(2), seed=0).train()
    network(PIXELS).sum().backward()
    assert network.get_parameter("layers.0.linear.adapted.right").grad is not None
    torch.testing.assert_close(fold_adapters(network)(PIXELS), network(PIXELS), atol=1e-4, rtol=1e-4)


def test_rival_of_a_small_model_has_fewer_channels() -> None:
    config = SmallShape((64,), 2, (Windows(16, 5, 2),)).config(spec())
    smaller = no_larger(config, parameter_bytes(build_model(config)) // 2)
    assert isinstance(smaller, FFNConfig)
    assert smaller.windows[0] == Windows(smaller.windows[0].channels, 5, 2)
    assert smaller.windows[0].channels < 16
    assert stored_bytes(build_model(smaller)) <= parameter_bytes(build_model(config)) / 2
