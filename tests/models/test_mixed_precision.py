"""What keeps float32 under autocast on the CPU."""

import torch

from research.models.conv_block import ConvBlock


def convolved_dtypes(block: ConvBlock, images: torch.Tensor) -> list[torch.dtype]:
    """The convolution's output dtype, seen by a hook, in one forward pass under autocast."""
    seen: list[torch.dtype] = []
    handle = block.get_submodule("conv").register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        block(images)
    handle.remove()
    return seen


def test_a_strided_depthwise_convolution_keeps_float32() -> None:
    images = torch.randn(2, 8, 8, 8)
    assert convolved_dtypes(ConvBlock(8, 8, 3, stride=2, groups=8), images) == [torch.float32]
    assert convolved_dtypes(ConvBlock(8, 8, 3, stride=1, groups=8), images) == [torch.bfloat16]
    assert convolved_dtypes(ConvBlock(8, 16, 3, stride=2), images) == [torch.bfloat16]


def test_a_strided_depthwise_block_under_autocast_is_the_block_in_float32() -> None:
    torch.manual_seed(0)
    block = ConvBlock(8, 8, 3, stride=2, groups=8)
    images = torch.randn(4, 8, 8, 8, requires_grad=True)
    plain = block(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(images)
    assert torch.equal(plain, mixed)
    gradients = [
        torch.autograd.grad(y.square().sum(), [images, block.get_parameter("conv.weight")]) for y in (plain, mixed)
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
