"""Shapes and types that the functions of this package ask of tensors."""

import torch


def wide_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Returns the widest dtype among `tensors` and float32, so that half precision never reaches the recursions."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_same_shape(**tensors: torch.Tensor) -> None:
    """Refuses tensors, given by name, that are not of one shape `(B, T)`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"Expected tensors of one shape (B, T), got {shapes}.")
