"""Launch the selective scan on the GPU: groups of channels become routes of the shared scan kernels."""

import torch
from torch import Tensor

from ssmpretrain.kernels.gpu import scan
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs


def forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,))."""
    y = torch.empty_like(inputs.u)
    out = _channel_last(y, copy=False)
    states, last = scan.forward(_scan(inputs), _grouped(out, inputs.B.shape[1]), keep_states, want_last=True)
    assert last is not None
    if out is not y:
        y.copy_(out)
    kept = states if states is not None and keep_states else inputs.u.new_empty(0, dtype=torch.float32)
    return y, last.flatten(1, 2), kept


def backward(
    dout: Tensor, dlast: Tensor | None, states: Tensor, inputs: ScanInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the tensors in `ScanInputs`, in their order; of what is absent, (0,)."""
    u, delta, A, B, C, _, z, *_ = inputs
    groups = B.shape[1]
    inputs_like = [t for t in (u, delta, z) if t is not None]
    gradients = [t.new_empty(t.shape[0], t.shape[2], t.shape[1]).mT for t in inputs_like]
    drows, dA, dD, dbias = scan.backward(
        _scan(inputs),
        _grouped(_channel_last(dout), groups),
        None if dlast is None else dlast.unflatten(1, (groups, -1)),
        states,
        1.0,
        tuple(_grouped(gradient, groups) for gradient in gradients),
    )
    du, ddelta, *dz = (torch.empty_like(t).copy_(g) for t, g in zip(inputs_like, gradients, strict=True))
    # a copy each, also where one token makes contiguous views of both: PyTorch wants no two outputs in one storage
    dB, dC = (
        torch.empty_like(rows, memory_format=torch.contiguous_format).copy_(drows[:, :, :, i].mT)
        for i, rows in enumerate((B, C))
    )
    return (
        *(du, ddelta, dA.flatten(0, 1), dB, dC),
        A.new_empty(0) if dD is None else dD.flatten(),
        dz[0] if dz else u.new_empty(0),
        A.new_empty(0) if dbias is None else dbias.flatten(),
    )


def states_shape(inputs: ScanInputs) -> tuple[int, ...]:
    """Return the shape of what the forward pass keeps."""
    batch, channels, tokens = inputs.u.shape
    groups = inputs.B.shape[1]
    return scan.states_shape(batch, groups, channels // groups, tokens, inputs.A.shape[1])


def _scan(inputs: ScanInputs) -> scan.Scan:
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = inputs
    batch, groups, state, tokens = B.shape
    column = scan.row_of_C(state)
    rows = B.new_empty(batch, groups, tokens, 2 * column, dtype=torch.float32)
    rows[..., :state] = B.mT
    rows[..., column : column + state] = C.mT

    def per_group(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.contiguous().view(groups, -1)

    return scan.Scan(
        u=_grouped(_channel_last(u), groups),
        delta=_grouped(_channel_last(delta), groups),
        A=A.contiguous().unflatten(0, (groups, -1)),
        rows=rows,
        D=per_group(D),
        bias=per_group(delta_bias),
        z=None if z is None else _grouped(_channel_last(z), groups),
        softplus=delta_softplus,
        routes=(int(reverse),),
    )


def _channel_last(tensor: Tensor, *, copy: bool = True) -> Tensor:
    """Return (B, E, L) with channels beside each other, as threads read them; a copy where they are not."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    batch, channels, tokens = tensor.shape
    fresh = tensor.new_empty(batch, tokens, channels).mT
    return fresh.copy_(tensor) if copy else fresh


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """View (B, E, L) as (B, G, E / G, L)."""
    grouped: Tensor = tensor.unflatten(1, (groups, -1))
    return grouped
