"""The FLOPs of matrix products and convolutions."""

import math
import re

from clipjax.hlo.text import Computation, Instruction, arrays

LIBRARY_PRODUCT = re.compile(r'custom_call_target="__(onednn\$matmul|cublas\$(lt\$)?(gemm|matmul))')
FUSED_ATTENTION = re.compile(r'custom_call_target="__cudnn\$fmhaSoftmax(Backward)?".*intermediate_tensor_shape.*?"(\d+)"\]')
PASSES = {"high": 3, "highest": 6}  # bfloat16 passes of a TPU for float32 operands; XLA's default is one


def product_flops(computation: Computation, i: Instruction) -> int:
    """2 m n k of a product, and of those in an attention of cuDNN; of a convolution, see `convolution_flops`; else 0."""
    if i.opcode == "custom-call" and (found := FUSED_ATTENTION.search(i.attributes)):
        backward, keys = found.groups()  # the scores' last axis
        queries = arrays(computation.body[i.operands[0]].shape)[0][1]
        return 2 * (5 if backward else 2) * math.prod(queries) * int(keys)  # the backward pass computes the scores again
    if i.opcode not in ("dot", "convolution") and not (i.opcode == "custom-call" and LIBRARY_PRODUCT.search(i.attributes)):
        return 0
    x, y = (arrays(computation.body[name].shape)[0][1] for name in i.operands[:2])
    out = arrays(i.shape)[0][1]
    if i.opcode == "dot":
        return 2 * math.prod(out) * math.prod(x[int(n)] for n in i.attribute("lhs_contracting_dims"))
    if i.opcode == "convolution":
        return convolution_flops(i, x, y, out)
    # A product by a library, with operands in any order: |x| |y| |out| = (batch m k) (batch k n) (batch m n).
    return 2 * math.isqrt(math.prod(x) * math.prod(y) * math.prod(out) // math.prod(out[:-2]))


def passes(computation: Computation, i: Instruction) -> int:
    """How many passes a TPU makes for a product: its units multiply bfloat16."""
    kinds = {arrays(computation.body[name].shape)[0][0] for name in i.operands[:2]}
    return max([PASSES.get(word, 1) for word in i.attribute("operand_precision")], default=1) if kinds == {"f32"} else 1


def convolution_flops(i: Instruction, x: tuple[int, ...], y: tuple[int, ...], out: tuple[int, ...]) -> int:
    """2 for every pair of a kernel entry and an image entry under it, padding left out, and for each output feature.

    XLA also writes matrix products as convolutions; a batch axis is then a padded window over one entry at a time.
    """
    left, right, result = re.findall(r"[^_\->]+", i.attribute("dim_labels")[0])
    window = dict(re.findall(r"(\w+)=(\S+)", (re.search(r"window=\{(.*?)\}", i.attributes) or ["", ""])[1]))

    def of_each(key: str, default: int) -> list[int]:  # pad=1_2x0_0 -> [1, 0]: the padding after the data follows from the sizes
        return [int(word.split("_")[0]) for word in window[key].split("x")] if key in window else [default] * len(spatial)

    spatial = [label for label in left if label.isdigit()]
    pairs = math.prod(
        _pairs(out[result.index(label)], x[left.index(label)], *(of_each(key, default)[int(label)] for key, default in WINDOW))
        for label in spatial
    )
    return 2 * out[result.index("b")] * out[result.index("f")] * y[right.index("i")] * pairs


WINDOW = (("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))


def _pairs(outputs: int, inputs: int, size: int, stride: int, pad: int, spread: int, kernel_spread: int) -> int:
    """Along one axis: the pairs of an output and a kernel entry over an input entry, not over padding or a gap."""
    shared = math.gcd(stride, spread)
    period = spread // shared
    found = 0
    for at in range(-pad, -pad + size * kernel_spread, kernel_spread):  # the entry is at p stride + at for output p
        if at % shared == 0:
            low, high = max(0, -(at // stride)), min(outputs - 1, ((inputs - 1) * spread - at) // stride)
            on_input = -(at // shared) * pow(stride // shared, -1, period) % period  # every period-th output from this one
            found += max(0, (high - on_input) // period - (low - 1 - on_input) // period)
    return found
