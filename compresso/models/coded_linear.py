"""Linears whose weights are stored as codes.

This file is part of every checkpoint that modeling_compresso.py runs. What the codes mean stands in
config.json, in one of two forms:

    {"kind": "affine", "dtype": "bfloat16", "bits": 3, "group_size": 64}
    {"kind": "vector", "dtype": "bfloat16", "block": 64, "points": [[0.5, 1.25], ...]}

and either can have "scale_bits": 8, the first "zero_bits" or "zero_dtype".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Weights decoded at once, as compresso does it: they and scratch copies fit the second-level cache.
CPU_TILE = 2**17
GPU_TILE = 2**25


class DecodedWeight(Tensor):
    """A weight that was decoded: to be read, as what changes it would not reach the codes.

    So an adapter cannot be merged into it, and whoever tries is told. What is computed from it is
    a plain tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what writes to it. In Python's own operators, too, that is called `add_` or so."""
        given = kwargs or {}
        name: str = func.__name__
        whole: Any = Tensor.data
        written = [given.get("out")]
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name == "__setitem__" or func == whole.__set__:
            written.append(next(iter((*args, *given.values()))))
        if any(isinstance(tensor, cls) for tensor in written):
            raise RuntimeError(
                "the weight of a CodedLinear cannot be changed, as it is stored as codes: an"
                " adapter stays beside it and cannot be merged"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **given)
            return found.as_subclass(cls) if func in (whole.__get__, Tensor.detach) else found

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A copy that can be changed."""
        return self.as_subclass(Tensor).clone()


class CodedLinear(nn.Linear):
    """Stands for a linear whose weight is stored as codes.

    The weight is decoded at the first forward and kept, as decoding takes longer than a product of
    few tokens. Memory then holds the weight, in the type that the model runs in, beside the codes,
    which stay what is saved. Moving or casting the model frees the weight until the next forward.
    Codes, scales and zeros keep the types they are stored in, whatever type the model is loaded in
    or cast to, so the weight has the same values in all of them, cast last.

    It is an `nn.Linear` so that others, such as PEFT, know it for a linear and can put an adapter
    beside it. But it has no parameter `weight`, and what it shows as its weight cannot be changed.

    Of an (out, in) weight, whichever way round the linear it stands for has its own, there are

        weight_codes (out, words) int32: the codes of a row as one stream of bits, lowest first; a
                     code has as many as the kind says, or as number its points
        weight_scale (out, groups): of every `group_size` or `block` weights of a row; with
                     "scale_bits" int8, in 128ths of weight_row_scale (out, 1), which is there then
        weight_zero  (out, groups): likewise, of the kind "affine" alone; with "zero_bits" int32
                     (groups, words): as many bits of each zero of a group as one stream, in parts
                     of 2**(bits - zero_bits); with 0 of them not there, as all are 2**(bits - 1)

    An affine code is the weight (code - zero) * scale. A vector code is a point, and that as many
    neighbouring weights as it has numbers; the points of a block, scaled, are multiplied by the
    orthonormal Hadamard matrix of its size. Computed in float32 and rounded once, to `dtype`.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_row_scale: Tensor
    weight_zero: Tensor

    def __init__(self, linear: nn.Module, kind: dict[str, Any]) -> None:
        """linear: whose place it takes, bias included. kind: as above."""
        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        self.out_features, self.in_features = out_and_in(linear)
        self.kind = kind
        affine = kind["kind"] == "affine"
        points = kind.get("points", [[0.0]])
        self._bits = kind["bits"] if affine else (len(points) - 1).bit_length()
        self._codes = self.in_features // len(points[0])
        groups = self.in_features // kind["group_size" if affine else "block"]
        self._stored_for: torch.dtype = getattr(torch, kind["dtype"])
        self._eight = kind.get("scale_bits") == 8
        self._zero_bits: int | None = kind.get("zero_bits") if affine else 0
        # transformers loads buffers in the types that they have here.
        self._register("codes", (self.out_features, _words(self._codes, self._bits)), torch.int32)
        scale_dtype = torch.int8 if self._eight else self._stored_for
        self._register("scale", (self.out_features, groups), scale_dtype)
        if self._eight:
            self._register("row_scale", (self.out_features, 1), self._stored_for)
        if self._zero_bits is None:
            zeros_in = getattr(torch, kind.get("zero_dtype", kind["dtype"]))
            self._register("zero", (self.out_features, groups), zeros_in)
        elif self._zero_bits:
            words = _words(self.out_features, self._zero_bits)
            self._register("zero", (groups, words), torch.int32)
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self._kept: Tensor | None = None
        self._is_hf_initialized = True  # transformers would draw random weights

    @property
    def weight(self) -> DecodedWeight:  # type: ignore[override]
        """The weight, (out, in): that of the last forward, or else of the type it is stored for."""
        dtype = self._stored_for if self._kept is None else self._kept.dtype
        return self._weight(dtype).as_subclass(DecodedWeight)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(inputs, self._weight(inputs.dtype), self.bias)

    def decode(self) -> Tensor:
        """The weight, (out, in), in the type that it is stored for."""
        device = self.weight_scale.device
        shape = self.out_features, self.in_features
        weight = torch.empty(shape, dtype=self._stored_for, device=device)
        zero = self._zeros()
        tile = max(1, (CPU_TILE if device.type == "cpu" else GPU_TILE) // self.in_features)
        for start in range(0, self.out_features, tile):
            self._decode_rows(slice(start, start + tile), zero, weight)
        return weight

    def _decode_rows(self, here: slice, zero: Tensor, weight: Tensor) -> None:
        scale = self.weight_scale[here].float()
        if self._eight:
            scale *= self.weight_row_scale[here].float() / 128
        scale = scale[..., None]
        codes = _unpack(self.weight_codes[here], self._bits, self._codes)
        if self.kind["kind"] == "affine":
            levels = codes.reshape(*scale.shape[:2], -1).float()
            rows = levels.sub_(zero[here][..., None].float()).mul_(scale)
        else:
            points = torch.tensor(self.kind["points"], dtype=torch.float32, device=codes.device)
            rows = _rotate(points[codes.int()].view(*scale.shape[:2], -1).mul_(scale))
        weight[here] = rows.view(len(rows), -1)

    def _zeros(self) -> Tensor:
        """Of every group, (out, groups); of a kind without any, or with one for all, (out, 1)."""
        if self._zero_bits is None:
            return self.weight_zero
        if self._zero_bits == 0:
            middle = 2.0 ** (self._bits - 1)
            return torch.full((self.out_features, 1), middle, device=self.weight_scale.device)
        parts = _unpack(self.weight_zero, self._zero_bits, self.out_features).t().float()
        return parts * 2.0 ** (self._bits - self._zero_bits)

    def _register(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.register_buffer(f"weight_{name}", torch.zeros(shape, dtype=dtype))

    def extra_repr(self) -> str:
        """What is shown of it: sizes and coding."""
        kind = {name: value for name, value in self.kind.items() if name != "points"}
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"

    def _weight(self, dtype: torch.dtype) -> Tensor:
        kept, device = self._kept, self.weight_codes.device
        if kept is None or kept.dtype != dtype or kept.device != device:
            # Autocast would take products of low precision; training cannot use what was made in
            # inference mode.
            exact = torch.autocast(device.type, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), exact:
                kept = self._kept = self.decode().to(dtype)
        return kept

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move as any module moves, but cast nothing that the codes need."""
        self._kept = None
        exact = {id(buffer) for buffer in self.buffers(recurse=False)}

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            cast = id(tensor) in exact and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if cast else moved

        return super()._apply(move, recurse)


def out_and_in(linear: nn.Module) -> tuple[int, int]:
    """Rows and columns of the weight of any linear, the way round that its product takes it."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features  # type: ignore[return-value]


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, of `bits` bits, of every row, uint8. words: (rows, n) int32."""
    stream = words.contiguous().view(torch.uint8)
    eights = -(-count // 8)  # codes in `bits` bytes
    stream = nn.functional.pad(stream, (0, eights * bits - stream.shape[1]))
    bytes_of_8 = stream.reshape(len(words), eights, bits)
    numbers = nn.functional.pad(bytes_of_8, (0, 8 - bits)).view(torch.int64)
    codes = [(numbers >> bits * place & 2**bits - 1).to(torch.uint8) for place in range(8)]
    return torch.cat(codes, -1).view(len(words), -1)[:, :count]


def _rotate(values: Tensor) -> Tensor:
    """(..., block) float32 times the orthonormal Hadamard matrix of the power of two `block`.

    The matrix is taken apart into two, as compresso does it: so all sums are rounded alike.
    """
    block = values.shape[-1]
    right = 1 << block.bit_length() // 2
    left = block // right
    half = torch.matmul(values.view(-1, right), _hadamard(right, values))
    return torch.matmul(_hadamard(left, values), half.view(-1, left, right)).view(values.shape)


def _hadamard(size: int, like: Tensor) -> Tensor:
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5
