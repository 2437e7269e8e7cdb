"""The compiled pass' own kernels (cpp/): built at start for this processor, and called.

By ctypes. g++ makes them in a few seconds, into a file that is gone once it is loaded, so there
is no binary to ship, to keep or to mistrust. Does not know the layers (compiled.py).
"""

import ctypes
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.engine.types import EngineError

SOURCE = Path(__file__).with_name("cpp") / "kernels.cpp"
# Not clang++: its OpenMP would be a second one beside torch's, with workers of its own.
COMPILERS = ("g++",)
# Sums may be reordered, for vector instructions; NaN and infinity may not be assumed away.
FLAGS = ["-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LONGEST_BUILD_S = 120.0
_WHAT_FOR = "decoder compiled (DESHIFT_DECODER) builds its kernels at start"
# For fewer tokens a kernel takes some microseconds: giving Python's lock away would take longer.
MANY_TOKENS = 64


class Kernels:
    """Kernels for products of one dtype. Tensors are of the CPU and dense, of the sizes that are
    told here: this is not looked at. Raises EngineError where they cannot be built."""

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in NAMES:
            raise EngineError(f"decoder compiled runs float32 and bfloat16, not {dtype}")
        held, released = _libraries()
        self._of_few = _Functions(held, NAMES[dtype])
        self._of_many = _Functions(released, NAMES[dtype])
        self._dtype = dtype

    def _functions(self, num_tokens: int) -> "_Functions":
        return self._of_few if num_tokens < MANY_TOKENS else self._of_many

    def add_and_norm(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor:
        """Add to hidden (N, D) float32 in place; its RMS norm times weight (D,) float32, (N, D)."""
        out = torch.empty(hidden.shape, dtype=self._dtype)
        self._functions(len(hidden)).add_and_norm(
            *hidden.shape,
            hidden.data_ptr(),
            None if added is None else added.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
        )
        return out

    def add(self, hidden: Tensor, added: Tensor) -> None:
        """To hidden (N, D) float32, in place."""
        add = self._functions(len(hidden)).add
        add(hidden.numel(), hidden.data_ptr(), added.data_ptr())

    def silu_and_multiply(self, gate_up: Tensor) -> Tensor:
        """(N, 2 I), gate before up -> (N, I)."""
        num_rows, width = gate_up.shape
        out = gate_up.new_empty(num_rows, width // 2)
        silu_and_multiply = self._functions(num_rows).silu_and_multiply
        silu_and_multiply(num_rows, width // 2, gate_up.data_ptr(), out.data_ptr())
        return out

    def attend(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        out: Tensor,
    ) -> None:
        """Rotate, store and attend, for a token of each of B rows.

        qkv (B, (Hq + 2 H) * Dh), rotary (B, 1, Dh) each, lengths (B,) int64: tokens before this
        one; keys (capacity, H, Dh, width) and values (capacity, H, width, Dh), in place; out
        (B, Hq * Dh). Raises EngineError where a row's next token has no room, having stored none.
        """
        _, num_heads, dim, width = keys.shape
        failed = self._of_many.attend(
            len(qkv),
            num_heads,
            out.shape[1] // (num_heads * dim),
            dim,
            width,
            lengths.data_ptr(),
            qkv.data_ptr(),
            *(table.data_ptr() for table in rotary),
            keys.data_ptr(),
            values.data_ptr(),
            scaling,
            out.data_ptr(),
        )
        if failed:
            raise EngineError("a row is longer than its slab is wide")

    def attend_chunks(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        chunks: Tensor,
        layer: int,
        heads: tuple[int, int, int],
        scaling: float,
        out: Tensor,
    ) -> None:
        """Rotate, store and attend, for chunks of prompts, each token to those up to itself.

        qkv (N, (Hq + 2 H) * Dh), rotary (N, 1, Dh) each; chunks (C, 5) int64: of each its first of
        the N tokens, how many it has, how many of its prompt lie before them, and room and address
        of the prompt's keys and values (L, 2, H, room, Dh), in place; heads: H, Hq / H, Dh; out
        (N, Hq * Dh), of which the chunks' tokens are written. Raises EngineError where a chunk has
        no room, having stored none.
        """
        failed = self._of_many.attend_chunks(
            len(chunks),
            len(qkv),
            *heads,
            layer,
            chunks.data_ptr(),
            qkv.data_ptr(),
            *(table.data_ptr() for table in rotary),
            scaling,
            out.data_ptr(),
        )
        if failed:
            raise EngineError("a chunk lies outside of its prompt's cache or of the pass")


class _Functions:
    """Of one library, for one dtype."""

    def __init__(self, library: ctypes.CDLL, dtype: str) -> None:
        sizes, pointers = [c_int64], [c_void_p]

        def function(name: str, argument_types: list[Any]) -> Any:
            return _function(library, f"{name}_{dtype}", argument_types)

        self.add = function("add", sizes + 2 * pointers)
        self.add_and_norm = function("add_and_norm", 2 * sizes + 3 * pointers + [c_float, c_void_p])
        self.silu_and_multiply = function("silu_and_multiply", 2 * sizes + 2 * pointers)
        self.attend = function("attend", 5 * sizes + 6 * pointers + [c_float, c_void_p])
        self.attend_chunks = function(
            "attend_chunks", 6 * sizes + 4 * pointers + [c_float, c_void_p]
        )
        self.attend.restype = self.attend_chunks.restype = c_int  # whether it failed


def _function(library: ctypes.CDLL, name: str, argument_types: list[Any]) -> Any:
    function = getattr(library, name)
    function.argtypes = argument_types
    function.restype = None
    return function


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The library twice: its calls keep Python's lock, or give it away meanwhile."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise EngineError(
            f"{_WHAT_FOR} and finds no C++ compiler: install g++, or choose decoder auto"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="deshift-") as folder:
            library = Path(folder) / "kernels.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(library)]
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD_S
            )
            return ctypes.PyDLL(str(library)), ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        words = [line for line in error.stderr.splitlines() if line.strip()] or [str(error)]
        told = next((line for line in words if "error" in line), words[-1])
        raise EngineError(f"{_WHAT_FOR} and cannot: {compiler}: {told}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{_WHAT_FOR} and cannot: {error}") from error
