"""GPTQ's rounding of one weight, given what its inputs are like (Frantar et al. 2022)."""

from __future__ import annotations

import torch

from ..runtime.errors import NumericalError
from .rounding import GPTQ
from .weight_grids import WeightGrid, nearest_codes


def gptq_codes(weight: torch.Tensor, hessian: torch.Tensor, grid: WeightGrid, method: GPTQ) -> torch.Tensor:
    """Codes float32 [N, K] for ``weight`` [N, K], given H [K, K] over the inputs, float32 or wider.

    Channel by channel in the order of H's diagonal, the rest of the row takes over the error that rounding leaves,
    weighed by the Cholesky factor of H's inverse. Raises NumericalError where H cannot be inverted.
    """
    num_channels = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    order = order if method.act_order else torch.arange(num_channels, device=weight.device)
    # A channel at a time: each is a row here, so that it lies in memory as a whole.
    scale, zero = (each.t().contiguous() for each in grid.of_channels(order))
    factor = factor_of_inverse(hessian[order][:, order], method.damp, "the Hessian of GPTQ")
    rest = weight.t()[order].to(factor.dtype)
    codes = torch.empty_like(rest)
    for start in range(0, num_channels, method.block_size):
        end = min(start + method.block_size, num_channels)
        block, errors = rest[start:end], torch.empty_like(rest[start:end])
        for channel in range(start, end):
            row, position = factor[channel, channel:end], channel - start
            codes[channel] = nearest_codes(block[position], scale[channel], zero[channel], grid.recipe)
            rounded = scale[channel] * (codes[channel] - zero[channel])
            errors[position] = (block[position] - rounded) / row[0]
            block[position:].addr_(row, errors[position], alpha=-1)
        rest[end:] -= factor[start:end, end:].t() @ errors
    return codes[order.argsort()].t().float()


def factor_of_inverse(hessian: torch.Tensor, damp: float, name: str) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H + damp * mean(diagonal); a channel that is always zero counts 1.

    Raises NumericalError, which calls H by ``name``, where there is none.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    raised = torch.where(diagonal == 0, 1.0, diagonal) + damp * mean
    damped = hessian.clone()
    damped.diagonal().copy_(raised)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        what = f"{name} has no Cholesky factor: its samples depend on each other"
        raise NumericalError(what, remedy="pass more text, or raise damp", field="damp")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
