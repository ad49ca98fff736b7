"""What every network promises: named operations only, a true structure, known sizes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research import models
from research.models import FloatModel
from research.models.blocks import Add, PadShortcut

NETWORKS: dict[str, tuple[Callable[[], FloatModel], int]] = {
    "resnet8": (models.resnet8, 32),
    "resnet20_a": (models.resnet20, 32),
    "resnet20_b": (lambda: models.resnet20(shortcut="B"), 32),
    "resnet20_pre_a": (lambda: models.resnet20(preactivation=True), 32),
    "resnet20_pre_b": (lambda: models.resnet20(preactivation=True, shortcut="B"), 32),
    "resnet20_per_conv": (lambda: models.resnet20(shortcut_per_conv=True, activation="hardtanh"), 32),
    "resnet32": (models.resnet32, 32),
    "resnet56": (models.resnet56, 32),
    "vgg_small": (models.vgg_small, 32),
    "vgg16_bn": (models.vgg16_bn, 32),
    "mobilenet_v2": (models.mobilenet_v2, 32),
    "resnet18_cifar": (models.resnet18, 32),
    "resnet18_imagenet": (lambda: models.resnet18(stem="imagenet"), 64),
}

PARAMETERS = {
    "resnet8": 75_290,
    "resnet20_a": 269_722,
    "resnet20_b": 272_474,
    "resnet20_pre_a": 269_722,
    "resnet20_pre_b": 269_722 + 512 + 2048,
    "resnet20_per_conv": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "vgg_small": 4_574_592 + 2 * 2 * (128 + 256 + 512) + 8192 * 10 + 10,
    "vgg16_bn": 14_710_464 + 2 * 4224 + 512 * 10 + 10,
    "mobilenet_v2": 3_504_872 - 1280 * 990 - 990,  # the paper's network with 10 instead of 1000 classes
    "resnet18_cifar": 11_173_962,
    "resnet18_imagenet": 11_689_512 - 512 * 990 - 990,
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, FloatModel, Tensor]:
    make, size = NETWORKS[request.param]
    torch.manual_seed(0)
    return request.param, make().eval(), torch.randn(2, 3, size, size)


class Recorder:
    """Calls of leaf modules during one forward pass: names in order, inputs and output of each."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.calls: list[tuple[str, tuple[Tensor, ...], Tensor]] = []
        leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
        handles = [module.register_forward_hook(self._hook(name)) for name, module in leaves]
        with torch.no_grad():
            self.output = model(x)
        for handle in handles:
            handle.remove()
        self.leaves = [name for name, _ in leaves]
        self.names = [name for name, _, _ in self.calls]
        self.readers: dict[int, list[str]] = {}
        for name, inputs, _ in self.calls:
            for tensor in inputs:
                self.readers.setdefault(id(tensor), []).append(name)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: self.calls.append((name, inputs, output))

    def bare_operations(self, x: Tensor) -> list[str]:
        """Leaves that read what no leaf wrote (nor the image); "output" where the logits are such a tensor."""
        known = {id(x)}
        found = []
        for name, inputs, output in self.calls:
            if any(id(tensor) not in known for tensor in inputs):
                found.append(name)
            known.add(id(output))
        return found if id(self.output) in known else [*found, "output"]


def test_forward_shape(network: tuple[str, FloatModel, Tensor]) -> None:
    _, model, x = network
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_every_operation_is_a_leaf_called_once(network: tuple[str, FloatModel, Tensor]) -> None:
    _, model, x = network
    recorder = Recorder(model, x)
    assert recorder.bare_operations(x) == []
    assert sorted(recorder.names) == sorted(recorder.leaves)


def test_recorder_finds_bare_operations() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x))) + 1

    x = torch.randn(2, 3)
    assert Recorder(Bare(), x).bare_operations(x) == ["second", "output"]


def test_structure_is_true(network: tuple[str, FloatModel, Tensor]) -> None:
    name, model, x = network
    structure = model.structure()
    recorder = Recorder(model, x)
    norms = {n for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    layers = [n for n in recorder.names if isinstance(model.get_submodule(n), nn.Conv2d | nn.Linear)]
    assert (structure.first, structure.last) == (layers[0], layers[-1])

    outputs = {n: output for n, _, output in recorder.calls}
    foldable = [
        (n, reader)
        for n in layers
        for reader in recorder.readers.get(id(outputs[n]), [])
        if reader in norms and len(recorder.readers[id(outputs[n])]) == 1
    ]
    assert list(structure.conv_bn) == foldable
    if "pre" not in name:
        assert {bn for _, bn in structure.conv_bn} == norms

    activations = [n for n in recorder.names if isinstance(model.get_submodule(n), nn.ReLU | nn.ReLU6 | nn.Hardtanh)]
    read_by = {n: recorder.readers[id(outputs[n])] for n in activations}
    alone = [(n, readers[0]) for n, readers in read_by.items() if len(readers) == 1 and readers[0] in layers]
    assert set(structure.activation_layer) <= set(alone)
    assert name == "mobilenet_v2" or set(structure.activation_layer) == set(alone), "all but networks of ReLU6"

    position = {n: index for index, n in enumerate(recorder.names)}
    spans = [[position[n] for n in recorder.names if n.startswith(f"{block}.")] for block in structure.blocks]
    assert all(span == list(range(span[0], span[-1] + 1)) for span in spans)
    assert all(before[-1] < after[0] for before, after in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet8", 3), ("resnet20_pre_b", 9), ("resnet56", 27), ("vgg_small", 6), ("vgg16_bn", 13), ("mobilenet_v2", 17)]
    + [("resnet18_cifar", 8)],
)
def test_number_of_blocks(name: str, count: int) -> None:
    assert len(NETWORKS[name][0]().structure().blocks) == count


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert sum(parameter.numel() for parameter in NETWORKS[name][0]().parameters()) == PARAMETERS[name]


def test_names_of_resnet() -> None:
    names = {name for name, _ in models.resnet20(shortcut="B").named_modules()}
    assert {"conv1", "bn1", "relu", "layer1.0.relu1", "layer1.0.relu2", "layer1.0.add", "fc"} <= names
    assert {"layer2.0.downsample.0", "layer2.0.downsample.1"} <= names
    assert isinstance(models.resnet20().get_submodule("layer2.0.downsample"), PadShortcut)
    assert models.resnet20(preactivation=True).structure().conv_bn[0] == ("layer1.0.conv1", "layer1.0.bn2")
    assert models.resnet20().structure().blocks[:4] == ("layer1.0", "layer1.1", "layer1.2", "layer2.0")


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.resnet8(in_channels=1),
        lambda: models.resnet8(in_channels=1, shortcut="B"),
        lambda: models.vgg_small(in_channels=1, image_size=28),
        lambda: models.vgg16_bn(in_channels=1, image_size=28),
        lambda: models.mobilenet_v2(in_channels=1, width_mult=0.25),
        lambda: models.resnet18(in_channels=1),
    ],
)
def test_grey_28x28_images(make: Callable[[], FloatModel]) -> None:
    with torch.no_grad():
        assert make().eval()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_width_and_classes() -> None:
    model = models.resnet20(width=80, num_classes=100, preactivation=True, shortcut="B")
    assert model.fc.weight.shape == (100, 320)
    assert models.mobilenet_v2(width_mult=0.5).fc.in_features == 1280
    assert models.mobilenet_v2(width_mult=1.4).fc.in_features == 1792


def test_pad_shortcut_values() -> None:
    x = torch.arange(2 * 2 * 7 * 7, dtype=torch.float32).reshape(2, 2, 7, 7)
    expected = torch.zeros(2, 6, 4, 4)
    for row in range(4):
        for column in range(4):
            expected[:, 2:4, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(PadShortcut(2, 2, 6)(x), expected)


def test_add() -> None:
    assert torch.equal(Add()(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])), torch.tensor([4.0, 7.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.ResNetCifar(21), r"^model\.depth=21: .*use 8, 20, 32 or 56$"),
        (lambda: models.ResNetCifar(2), r"^model\.depth=2: "),
        (lambda: models.resnet20(shortcut="C"), r"^model\.shortcut=C: use A"),
        (lambda: models.resnet18(stem="tiny"), r"^model\.stem=tiny: use cifar"),
        (lambda: models.mobilenet_v2(width_mult=0), r"^model\.width_mult=0: "),
        (lambda: PadShortcut(2, 3, 6), r"^model\.shortcut=A: 3 channels .*shortcut=B$"),
    ],
)
def test_bad_options(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
