# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
"""What inline code is given: a number out of a register, and where an array lies in GMEM."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def scalar(register: Any, index: int = 0) -> Any:
    """A number out of a register of a `FragmentedArray`, which may be a vector."""
    if not isinstance(register.type, ir.VectorType):
        return register
    i32 = ir.IntegerType.get_signless(32)
    return llvm.extractelement(register, arith.constant(i32, index))


def global_pointer(ref: Any) -> Any:
    """To the first element of a GMEM array, in the address space that PTX calls `.global`."""
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(ref))


def global_address(ref: Any) -> Any:
    """`global_pointer` as an i64, for inline PTX and for arithmetic in bytes."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), global_pointer(ref))
