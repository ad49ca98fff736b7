"""What counts how in a cost: the explicit convention that travels with every number."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

FirstLast = Literal["all", "fixed8", "fp", "excluded"]
ShortcutPolicy = Literal["counted", "excluded"]
Form = Literal["product", "uniq"]


@dataclass(frozen=True)
class CostConvention:
    """How the cost of a network is counted.

    Args:
        first_last: the layers that read the image and write the logits: ``all`` (at the bits they have), ``fixed8``
            (8/8), ``fp`` (32/32), ``excluded`` (not at all).
        shortcut: whether the convolutions of shortcuts count.
        shortcut_names: regular expression for the whole name of such a layer.
        input_bits: width of the image in the first layer, unless that layer is float; None for that of its quantizer.
        form: form of the BOPs, ``product`` or ``uniq``.
        count_sign_bit: add a bit to every quantized weight, for widths of others that leave the sign out. Ours have it:
            what BSQ and CSQ publish is one bit less than the widths of our `bsq` and `csq`.
        count_biases, count_ranges, count_norms: add 32 bits to the size for each bias, each scale or zero point of a
            weight, each batch-norm parameter.

    Raises:
        ValueError: an unknown value, naming the key.
    """

    first_last: FirstLast = "all"
    shortcut: ShortcutPolicy = "counted"
    shortcut_names: str = r".*\bdownsample\b.*"
    input_bits: int | None = 8
    form: Form = "product"
    count_sign_bit: bool = False
    count_biases: bool = False
    count_ranges: bool = False
    count_norms: bool = False

    def __post_init__(self) -> None:
        for key, choices in (("first_last", FirstLast), ("shortcut", ShortcutPolicy), ("form", Form)):
            if getattr(self, key) not in get_args(choices):
                raise ValueError(f"cost.{key}={getattr(self, key)}: use one of {', '.join(get_args(choices))}")
        if self.input_bits is not None and self.input_bits not in range(1, 33):
            raise ValueError(f"cost.input_bits={self.input_bits}: use 1 to 32, or null for the quantizer's own")
        for key in ("count_sign_bit", "count_biases", "count_ranges", "count_norms"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"cost.{key}={getattr(self, key)}: use true or false")
        try:
            re.compile(self.shortcut_names)
        except (re.error, TypeError) as error:
            raise ValueError(f"cost.shortcut_names={self.shortcut_names!r}: no regular expression ({error})") from None

    def plain(self) -> dict[str, str | int | bool | None]:
        """The convention as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
