"""Compiles the kernels for GPUs of some capabilities, and prints what they became, as JSON. It takes no GPU.

Not a test module: Triton must not interpret here, and it decides on that when it is imported.
"""

import json
import re
import subprocess
import tempfile
from itertools import product

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from axolotl_cvloss.engine import kernels

# The dtype of the logits, and whether all is asked for.
CASES = [("bf16", False), ("bf16", True), ("fp32", True)]
FLAGS = ("CAPPED", "MEAN", "ENTROPY", "ACCURACY", "COLLISION", "SQUARES", "TEMPERED", "BENT")


def compiled(kernel, capability, dtype, everything):
    names = kernel.arg_names
    constants = {name: everything for name in FLAGS if name in names}
    constants["BLOCK"] = kernels.BLOCK
    kinds = {"logits": f"*{dtype}", "labels": "*i64"} | dict.fromkeys(("scale", "softcap", "temperature"), "fp32")
    rows = ("largest", "top", "slope", "own", "mean", "of_log", "of_p", "steep", "sharp", "odds", "found")
    kinds |= dict.fromkeys(rows, "*fp32")
    kinds |= {"values": f"*{dtype}", "by": "*fp32"} | dict.fromkeys(constants, "constexpr")
    # What Triton sees of the arguments: a buffer begins anywhere that 16 divides, and so do its padded rows.
    padded = {(names.index(name),): [["tt.divisibility", 16]] for name in _aligned(kernel)}
    source = ASTSource(
        kernel,
        {name: kinds.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        padded,
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": kernels.WARPS}).asm


def _aligned(kernel):
    return ("values", "n", "step") if kernel is kernels.scale_kernel else ("logits", "stride", "width")


def resources(cubin):
    """Registers of a thread, and bytes of its stack: values that found no register lie there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", said).group(1)) for name in ("REG", "STACK", "LOCAL")}


def main():
    found = []
    for capability, kernel, (dtype, everything) in product(
        (80, 90), (kernels.collect_kernel, kernels.pull_kernel, kernels.scale_kernel), CASES
    ):
        asm = compiled(kernel, capability, dtype, everything)
        accesses = re.findall(r"(ld|st)\.global\.(?:\w+::\w+\.)*((?:v\d\.)?\w+)", asm["ptx"])
        found.append(
            {
                "kernel": kernel.__name__,
                "capability": capability,
                "dtype": dtype,
                "everything": everything,
                "loads": [width for what, width in accesses if what == "ld"],
                "stores": [width for what, width in accesses if what == "st"],
                **resources(asm["cubin"]),
            }
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
