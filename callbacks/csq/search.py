"""What searches over bit planes share (CSQ, BSQ): planes in the place of LSQ weights, and the exact end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from callbacks.bit_search import BitSearch, SearchState
from callbacks.csq.planes import width_of
from research.learning.mechanic import Claim, ParameterGroup
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Choices, budgets_from_config
from research.quant.conv_bn import QuantConvBn2d
from research.quant.kernels import positive
from research.quant.layers import QuantLayer, quant_layers
from research.quant.quantizers.base import MAX_BITS, Quantizer
from research.quant.quantizers.lsq import LSQ

if TYPE_CHECKING:
    from research.learning.module import QuantModule

WEIGHTS = ("average_bits", "size", "bops")
"""Kinds of budgets that depend on the widths of weights."""
OF_LATENT_WEIGHTS = ("bin_regularization", "kurtosis", "oscillation_dampening")


class PlaneWeight(Quantizer):
    """A weight quantizer that holds the weight itself, as positive and negative bit planes.

    What it is given plays no role; the layer's own weight stays what it was, and mode ``identity`` is that. ``codes``
    and ``scale`` are those of the exact weight that the planes stand for at present.

    Args:
        source: the LSQ quantizer to take the place of.
        planes: N; a width is that of the codes, with their sign: N + 1 at most.

    Attributes:
        positive, negative: (N, elements), the first plane the most significant.
        raw_scale: 0-dim, used by its magnitude.
    """

    owns_weight = True
    channelwise = False
    min_bits = {"weight": 2, "input": 2, "output": 2}

    def __init__(self, source: LSQ, planes: int) -> None:
        spec = replace(source.spec, granularity="tensor")
        super().__init__(spec.with_bits(planes + 1), source.shape, None, "weight")
        self.planes = planes
        self._plain = (spec, source.shape, None, source.role)
        self._plain_options = (source.count_batch, source.gradient_factor, source.mask)
        elements = torch.Size(source.shape).numel()
        self.positive = nn.Parameter(torch.zeros(planes, elements))
        self.negative = nn.Parameter(torch.zeros(planes, elements))
        self.raw_scale = nn.Parameter(torch.ones(()))

    @property
    def magnitude(self) -> Tensor:
        """The trained scale s, positive, 0-dim."""
        return positive(self.raw_scale)

    def transform(self, x: Tensor) -> Tensor:
        """The weight in units of the exact one's codes."""
        return self.fake_quantize(x) / self.scale

    def dequantize(self, codes: Tensor) -> Tensor:
        """``scale * codes``."""
        scale = self.scale
        return codes.to(scale.dtype) * scale

    def plain(self, scale: Tensor, bits: int) -> LSQ:
        """The LSQ quantizer with this scale and width, one for the tensor; otherwise that of the recipe."""
        found = LSQ(*self._plain, *self._plain_options).to(scale.device, scale.dtype).train(self.training)
        found.raw_scale.fill_(scale)
        found.bits.fill_(bits)
        found.initialised.copy_(self.initialised)
        return found


def planes_of(layer: nn.Module) -> Any:
    """The bit planes of a layer: a `PlaneWeight` of the mechanic's own kind."""
    found = layer.weight_quantizer
    assert isinstance(found, PlaneWeight)
    return found


@torch.no_grad()
def make_exact(layer: QuantLayer, codes: Tensor, scale: Tensor, bits: int) -> None:
    """Give ``layer`` the LSQ quantizer of this scale and width, and the weight ``scale * codes``.

    Args:
        layer: with a `PlaneWeight`.
        codes: integers in the shape of the weight, that ``bits`` hold.
        scale: 0-dim, positive.
        bits: width, sign included.
    """
    plain = planes_of(layer).plain(scale, bits)
    layer.weight_quantizer = plain
    layer.weight.copy_(codes.to(scale.dtype) * scale)
    layer.weight.requires_grad_(True)


class PlaneState(SearchState):
    """Where a search stands: saved with the run.

    Attributes:
        fixed: whether the widths are.
        mark: the last thing that was done once: CSQ's rounds that are over, BSQ's step of the last re-quantization.
    """

    fixed: Tensor
    mark: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.tensor(False))
        self.register_buffer("mark", torch.tensor(0))


class PlaneSearch(BitSearch):
    """Base of the mechanics that choose widths by bit planes.

    Args:
        budget: one or several, see `research.quant.budget`; bits count the sign.
        planes: bit planes that a layer starts with.
        until: part of the run after which the widths stay.
        least: planes that a layer keeps at least.
        search_ends: also the first and the last layer.
        lr_factor: learning rate of the planes, as a multiple of the run's.
        adam_lr: learning rate of an Adam for the planes alone, in place of the run's optimizer; None: no such.
        weight_decay: of all that the planes train; None: the run's.
    """

    claims: frozenset[Claim] = frozenset({"bits", "weight_quantizer"})
    state: PlaneState

    def __init__(
        self,
        budget: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        planes: int,
        until: float,
        least: int,
        search_ends: bool,
        lr_factor: float,
        adam_lr: float | None,
        weight_decay: float | None,
    ) -> None:
        key = f"callbacks.{self.slug}"
        self.budgets = budgets_from_config(budget, f"{key}.budget")
        if not any(each.kind in WEIGHTS for each in self.budgets):
            raise ValueError(f"{key}.budget: the planes are those of weights; use a budget of {', '.join(WEIGHTS)}")
        if not 1 <= planes < MAX_BITS:
            raise ValueError(f"{key}.planes={planes}: use 1 to {MAX_BITS - 1}, the sign is one more bit")
        if lr_factor <= 0:
            raise ValueError(f"{key}.lr_factor={lr_factor}: use more than 0")
        if adam_lr is not None and adam_lr <= 0:
            raise ValueError(f"{key}.adam_lr={adam_lr}: use more than 0, such as 1e-3, or null")
        self.planes = planes
        self.until = until
        self.least = least
        self.search_ends = search_ends
        self.lr_factor = lr_factor
        self.weight_decay = weight_decay
        self.adam_lr = adam_lr

    # -- construction ------------------------------------------------------------------------------------------

    @abstractmethod
    def make(self, source: LSQ) -> PlaneWeight:
        """The planes that take the place of a quantizer."""

    def attach(self, module: QuantModule) -> None:
        """Put bit planes in the place of the LSQ quantizers of the weights."""
        key = f"callbacks.{self.slug}"
        for other in module.active:
            if other.slug in OF_LATENT_WEIGHTS:
                raise ValueError(f"{key}: callbacks.{other.slug} acts on latent weights, planes have none; drop one")
        self.layers = self.searched_layers(module.net)
        for name, layer in self.layers.items():
            source = layer.weight_quantizer
            if type(source) is not LSQ or isinstance(layer, QuantConvBn2d):
                raise ValueError(
                    f"{key}: {name} is to end as an LSQ weight of its own; use quantizer.weight.name=lsq, "
                    "quantizer.widths=[] and quantizer.fold_bn=none"
                )
            layer.weight_quantizer = self.make(source)
            layer.weight.requires_grad_(False)
        self.choices = self.choices_of(
            module.net, lambda present: [LayerBits(width_of(span), present.input) for span in range(self.planes + 1)]
        )
        self.state = PlaneState()
        module.mechanics[self.slug] = self.state

    @property
    def reachable(self) -> Choices:
        """Searched layers keep their least planes."""
        return {
            name: options[self.least :] if name in self.layers else options for name, options in self.choices.items()
        }

    def parameter_groups(self, module: QuantModule) -> list[ParameterGroup]:
        """The planes; all else that their quantizers train."""
        planes: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for quantizer in self.quantizers.values():
            for name, parameter in quantizer.named_parameters():
                (planes if name in ("positive", "negative") else others).append(parameter)
        decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        if self.adam_lr is None:
            own = ParameterGroup(planes, {**decay, "lr_factor": self.lr_factor})
        else:
            own = ParameterGroup(planes, decay, {"_target_": "torch.optim.Adam", "lr": self.adam_lr})
        return [own, ParameterGroup(others, decay)]

    # -- budget ------------------------------------------------------------------------------------------------

    @property
    def quantizers(self) -> dict[str, Any]:
        """The bit planes by the name of their layer."""
        return {name: planes_of(layer) for name, layer in self.layers.items()}

    def fits(self, widths: Mapping[str, int]) -> bool:
        """Whether these widths, by layer, are within the budgets; true where costs are not known."""
        allocation = Allocation(
            {
                name: LayerBits(widths.get(name, options[0].weight), options[0].input)
                for name, options in self.choices.items()
            }
        )
        return not self.is_prepared or self.within(allocation)

    # -- end ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def exact_forms(self, net: nn.Module) -> dict[str, tuple[Tensor, Tensor, int]]:
        """Codes, scale and width of every layer that has planes in ``net``, this network or a copy; it may change."""

    @torch.no_grad()
    def finalise(self, net: nn.Module) -> None:
        """Make the layers with planes LSQ's, of exactly their weight; refuse a network above its budget."""
        if not any(isinstance(layer.weight_quantizer, PlaneWeight) for _, layer in quant_layers(net)):
            return
        for name, (codes, scale, bits) in self.exact_forms(net).items():
            layer = net.get_submodule(name)
            assert isinstance(layer, QuantLayer)
            make_exact(layer, codes, scale, bits)
        if self.is_prepared:
            self.require_within(net)

    def found(self) -> Allocation:
        """The widths of the exact network."""
        net = self.module.plain_copy()
        self.finalise(net)
        return Allocation.of(net)
