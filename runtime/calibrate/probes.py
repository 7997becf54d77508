"""What is run on a device to learn its facts, and how large that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dfc.planning.cost import MAPPED
from dfc.runtime.calibrate.chains import Chain

LAUNCHED = {  # classes of operators, tiny: what is left is the time to start them
    "launch": Chain(("relu", "add"), (2, 4, 8), ((2, 4, 8),), length=8),
    "launch_view": Chain(("view", "transpose"), (2, 4, 4, 8), length=8),
    "launch_matmul": Chain(("linear",), (2, 4, 8), ((8, 8), (8,)), length=8),
    "launch_conv": Chain(("conv",), (2, 8, 4, 4), ((8, 8, 3, 3),), length=4),
    "launch_unfold": Chain(("conv",), (1, 8, 4, 4), ((8, 8, 3, 3),), length=4),
    "launch_norm": Chain(("layer_norm",), (2, 4, 8), ((8,),), length=8),
    "launch_attention": Chain(("attention",), (2, 4, 8, 8), length=4),
}
DTYPES = {"peak_f16": "f16", "peak_bf16": "bf16", "peak_f64": "f64"}
HALF = "peak of half the side"  # where long samples are disturbed, the shorter ones tell the peak
PRODUCTS = 128  # matrices of a batch
FRESH = 3 * MAPPED // 8  # elements, of more bytes than malloc keeps


@dataclass(frozen=True)
class Sizes:
    """How large what is measured is: a processor's caches and rates are not a GPU's."""

    side: int  # of a matrix product near the peak, and of other dtypes, which may be far slower
    other: int
    small: int  # of a product that shows what small sides cost
    few: int  # elements that fit the nearest cache; some, which fit the largest at most; and many
    some: int
    many: int
    image: int  # side of the image of a convolution
    tokens: int


CPU = Sizes(
    side=512, other=128, small=64, few=1 << 16, some=1 << 20, many=4 << 20, image=28, tokens=128
)
# Each long enough that it takes longer than starting it: what is shorter tells of the host alone.
GPU = Sizes(
    side=4096, other=4096, small=1024, few=1 << 22, some=1 << 24, many=1 << 28, image=224,
    tokens=1024,
)  # fmt: skip
QUICK = Sizes(
    side=192, other=64, small=48, few=1 << 15, some=1 << 19, many=3 << 20, image=14, tokens=64
)


def sizes_for(kind: str, quick: bool) -> Sizes:
    """Quick ones are for processors: of a GPU small sizes tell nothing, large ones take no time."""
    return GPU if kind == "cuda" else QUICK if quick else CPU


def chains_of(sizes: Sizes, kind: str) -> dict[str, Chain]:
    """What is run, by the fact that it tells."""
    side, image = sizes.side, sizes.image
    square, half, other = (Chain(("mm",), (n, n), ((n, n),)) for n in (
        side, side // 2, sizes.other))  # fmt: skip
    few, some, many, fresh = ((n // 256, 256) for n in (
        sizes.few, sizes.some, sizes.many, FRESH))  # fmt: skip
    n = sizes.small
    found = {
        **LAUNCHED,
        "peak": square,
        HALF: half,
        **{fact: replace(other, dtype=dtype) for fact, dtype in DTYPES.items()},
        "grain": Chain(("linear",), (1, n, n), ((n, n), (n,)), length=4),
        "rate_conv": Chain(("conv",), (2, 64, image, image), ((64, 64, 3, 3),)),
        "bw_conv": Chain(("conv",), (16, 8, image, image), ((8, 8, 1, 1),)),
        "rate_attention": Chain(("attention",), (1, 8, sizes.tokens, 64)),
        "launch_each": Chain(("attention",), (16, 8, 8, 8)),
        "rate_math": Chain(("exp",), few),
        "bw_cache": Chain(("add",), few, (few,), length=2),
        "cache": Chain(("add",), some, (some,)),
        "bw": Chain(("add",), many, (many,)),
        "launch_product": Chain(("bmm",), (PRODUCTS, 8, 8), ((PRODUCTS, 8, 8),)),
    }
    return {**found, "bw_fresh": Chain(("add",), fresh, (fresh,))} if kind == "cpu" else found
