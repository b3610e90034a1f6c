"""Linears whose weights are stored as codes.

This file is part of every checkpoint that modeling_compresso.py runs. What the codes mean stands in
config.json, in one of two forms:

    {"kind": "affine", "dtype": "bfloat16", "zero_dtype": "float16", "bits": 3, "group_size": 64}
    {"kind": "vector", "dtype": "bfloat16", "block": 64, "points": [[0.5, 1.25], ...]}
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
        weight_scale (out, groups): of every `group_size` or `block` weights of a row
        weight_zero  (out, groups): likewise, of the kind "affine" alone

    An affine code is the weight (code - zero) * scale. A vector code is a point, and that as many
    neighbouring weights as it has numbers; the points of a block, scaled, are multiplied by the
    orthonormal Hadamard matrix of its size. Computed in float32 and rounded once, to `dtype`.
    """

    weight_codes: Tensor
    weight_scale: Tensor
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
        words = torch.zeros(
            self.out_features, -(-self._codes * self._bits // 32), dtype=torch.int32
        )
        # transformers loads buffers in the types that they have here.
        self.register_buffer("weight_codes", words)
        types = {"weight_scale": kind["dtype"]}
        if affine:  # zeros are of the same type unless another is given
            types["weight_zero"] = kind.get("zero_dtype", kind["dtype"])
        for name, dtype in types.items():
            values = torch.zeros(self.out_features, groups, dtype=getattr(torch, dtype))
            self.register_buffer(name, values)
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self._kept: Tensor | None = None
        self._is_hf_initialized = True  # transformers would draw random weights

    @property
    def weight(self) -> DecodedWeight:  # type: ignore[override]
        """The weight, (out, in): that of the last forward, or else of the type it is stored for."""
        dtype = self.weight_scale.dtype if self._kept is None else self._kept.dtype
        return self._weight(dtype).as_subclass(DecodedWeight)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(inputs, self._weight(inputs.dtype), self.bias)

    def decode(self) -> Tensor:
        """The weight, (out, in), in the type that it is stored for."""
        weight = torch.empty(
            self.out_features,
            self.in_features,
            dtype=self.weight_scale.dtype,
            device=self.weight_scale.device,
        )
        tile = max(1, (CPU_TILE if weight.device.type == "cpu" else GPU_TILE) // self.in_features)
        for start in range(0, self.out_features, tile):
            self._decode_rows(slice(start, start + tile), weight)
        return weight

    def _decode_rows(self, here: slice, weight: Tensor) -> None:
        scale = self.weight_scale[here].float()[..., None]
        codes = _unpack(self.weight_codes[here], self._bits, self._codes)
        if self.kind["kind"] == "affine":
            levels = codes.reshape(*scale.shape[:2], -1).float()
            rows = levels.sub_(self.weight_zero[here].float()[..., None]).mul_(scale)
        else:
            points = torch.tensor(self.kind["points"], dtype=torch.float32, device=codes.device)
            rows = _rotate(points[codes.int()].view(*scale.shape[:2], -1).mul_(scale))
        weight[here] = rows.view(len(rows), -1)

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
