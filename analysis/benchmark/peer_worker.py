"""One peer beside the float network and our own, in turn in one process: ``python -m analysis.benchmark.peer_worker``.

Runs in the peer's environment, of which it asks for torch and safetensors alone. Reads a `Request` as JSON from
standard input and writes what it measured as the last line of its output.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import research.models
from analysis.benchmark.interleaved import Clock, interleaved
from analysis.benchmark.saved import SavedMemory
from research.models.structure import FloatModel
from research.quant.calibrate import calibrate
from research.quant.compiler import has_compiler
from research.quant.convert import convert
from research.quant.fused import Kernels
from research.quant.passes import use_kernels
from research.quant.recipe import Recipe
from research.runs.memory import keep_freed_memory

FLOAT = "float"
OURS: dict[str, Kernels] = {"flatbit": "eager", "flatbit, quantizers compiled": "compiled"}
"""Our own networks, by name, with their kernels."""


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        peer: of `PEERS`.
        recipe: our own quantizer's, as plain values.
        model: of research.models.
        bits: of weights and inputs; those of the first and the last layer are 8.
        rounds: training steps of each network that count.
        batch_size: 32x32 images a step.
        threads: of torch.
        clock: see `interleaved`.
        device: where.
    """

    peer: str
    recipe: dict[str, Any]
    model: str
    bits: int
    rounds: int
    batch_size: int
    threads: int
    clock: Clock
    device: str


def layers(net: FloatModel, bits: int) -> Iterator[tuple[str, nn.Conv2d | nn.Linear, int, bool]]:
    """Name, layer, bits, and whether its input is signed, of every convolution and linear layer."""
    structure = net.structure()
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, module, 8 if name in (structure.first, structure.last) else bits, name == structure.first


def ours(net: FloatModel, recipe: dict[str, Any], kernels: Kernels, images: Tensor) -> nn.Module:
    """Our LSQ with its fused quantizers."""
    structure = net.structure()
    convert(net, Recipe.from_config(recipe), structure.first, structure.last, conv_bn=structure.conv_bn)
    net.to(images.device)
    calibrate(net, [images])
    use_kernels(net, kernels)
    return net


def brevitas(net: FloatModel, bits: int, images: Tensor) -> nn.Module:
    """Learned scales, from the statistics of one step."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    for name, layer, width, signed in layers(net, bits):
        options = {
            "bias": layer.bias is not None,
            "weight_quant": Int8WeightPerTensorFloat,
            "weight_bit_width": width,
            "weight_scaling_impl_type": "parameter_from_stats",
            "input_quant": Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
            "input_bit_width": width,
            "input_collect_stats_steps": 1,
        }
        if isinstance(layer, nn.Conv2d):
            place = {"stride": layer.stride, "padding": layer.padding}
            new = qnn.QuantConv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **place, **options)
        else:
            new = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        new.load_state_dict(layer.state_dict(), strict=False)
        net.set_submodule(name, new)
    return net


def attached(net: FloatModel, bits: int, fake_quantize: Callable[..., nn.Module]) -> nn.Module:
    """Fake-quantize modules on weights and inputs of every layer; ``fake_quantize(low, high, signed)`` makes one."""
    for _, layer, width, signed in layers(net, bits):
        half = 2 ** (width - 1)
        low, high = (-half, half - 1) if signed else (0, 2**width - 1)
        nn.utils.parametrize.register_parametrization(
            layer, "weight", fake_quantize(-half, half - 1, True), unsafe=True
        )
        layer.input_quantizer = fake_quantize(low, high, signed)
        layer.register_forward_pre_hook(lambda module, inputs: (module.input_quantizer(inputs[0]),))
    return net


def torch_ao(net: FloatModel, bits: int, images: Tensor) -> nn.Module:
    """Scales of observers, which go on observing."""
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    def make(low: int, high: int, signed: bool) -> nn.Module:
        return FakeQuantize(MovingAverageMinMaxObserver, low, high, dtype=torch.qint8 if signed else torch.quint8)

    return attached(net, bits, make)


def torch_ao_learnable(net: FloatModel, bits: int, images: Tensor) -> nn.Module:
    """Learned scales, from the statistics of one step."""
    from torch.ao.quantization import MovingAverageMinMaxObserver
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    def make(low: int, high: int, signed: bool) -> nn.Module:
        dtype = torch.qint8 if signed else torch.quint8
        return _LearnableFakeQuantize(MovingAverageMinMaxObserver, low, high, use_grad_scaling=True, dtype=dtype)

    attached(net, bits, make).to(images.device)
    quantizers = [module for module in net.modules() if isinstance(module, _LearnableFakeQuantize)]
    for quantizer in quantizers:
        quantizer.enable_static_estimate()
    net(images)
    for quantizer in quantizers:
        quantizer.enable_param_learning()
    return net


def torchao_pt2e(net: FloatModel, bits: int, images: Tensor) -> nn.Module:
    """The exported graph with the x86 backend's quantizers: 8 bits, whatever is asked for."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(net.to(images.device), (images,)).module()
    prepared: nn.Module = prepare_qat_pt2e(exported, quantizer)
    return move_exported_model_to_train(prepared)


PEERS: dict[str, tuple[Callable[[FloatModel, int, Tensor], nn.Module], str, str]] = {
    "Brevitas": (brevitas, "brevitas", "W{bits}A{bits}, scales learned"),
    "torch.ao FakeQuantize": (torch_ao, "torch", "W{bits}A{bits}, scales observed"),
    "torch.ao _LearnableFakeQuantize": (torch_ao_learnable, "torch", "W{bits}A{bits}, scales learned"),
    "torchao PT2E": (torchao_pt2e, "torchao", "W8A8, scales observed"),
}
"""How each quantizes a float network, the package whose version is told, and what comes out, in words."""


def float_network(request: Request) -> FloatModel:
    """The same weights each time, in training mode."""
    torch.manual_seed(0)
    net: FloatModel = getattr(research.models, request.model)()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.train()


def training_step(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Callable[[], None], int]:
    """A training step of ``net``, and the bytes that its backward pass keeps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # collects what statistics there are
    with SavedMemory(net.parameters()) as saved:
        loss = nn.functional.cross_entropy(net(images), labels)
    kept = saved.kept
    loss.backward()
    optimizer.zero_grad()
    return step, kept


def measure(request: Request) -> dict[str, Any]:
    """``seconds`` of every round and ``saved_bytes`` by network, and what the peer is."""
    torch.set_num_threads(request.threads)
    keep_freed_memory()  # as every training of ours; here all networks have it
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(request.batch_size, 3, 32, 32, generator=generator).to(request.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(request.batch_size, device=request.device) % 10
    build, package, form = PEERS[request.peer]
    networks = {
        FLOAT: float_network(request).to(request.device),
        **{
            name: ours(float_network(request), request.recipe, kernels, images)
            for name, kernels in OURS.items()
            if kernels == "eager" or has_compiler()
        },
        request.peer: build(float_network(request), request.bits, images).to(request.device),
    }
    steps, saved = {}, {}
    for name, net in networks.items():
        steps[name], saved[name] = training_step(net, images, labels)
    return {
        "torch": torch.__version__,
        "version": importlib.metadata.version(package),
        "form": form.format(bits=request.bits),
        "seconds": interleaved(steps, request.rounds, clock=request.clock),
        "saved_bytes": saved,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Request(**json.load(sys.stdin)))))
