"""VMamba2 from its definition: one position after the other along every route, whole maps, hidden positions skipped."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.encoders.vmamba2 import CrossSSDMixer, VMamba2

# The routes of each scan, as (row or column first, backwards).
ROUTES = {
    "cross": [("h", False), ("v", False), ("h", True), ("v", True)],
    "bidirectional": [("h", False), ("h", False), ("h", True), ("h", True)],
    ("v_flip", "h", "w2"): [("v", True), ("h", False), ("w2", False)],
}


def visits(kind: str, backwards: bool, height: int, width: int) -> list[tuple[int, int]]:
    """Return the positions (row, column) of a map in the order of a route."""
    by_row = [(row, column) for row in range(height) for column in range(width)]
    keys = {
        "h": lambda at: at,
        "v": lambda at: (at[1], at[0]),
        "w2": lambda at: (at[0] // 2, at[1] // 2, at[0], at[1]),
    }
    return sorted(by_row, key=keys[kind], reverse=backwards)


def mixed_by_loop(mixer: CrossSSDMixer, x: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return the mixer's output, (B, H, W, C), zero at hidden positions.

    Args:
        mixer: The mixer.
        x: Its input, (B, H, W, C).
        visible: Whether each position is visible, (B, H, W); None for all.
    """
    batch, height, width, _ = x.shape
    visible = torch.ones(batch, height, width, dtype=torch.bool) if visible is None else visible
    (num_routes, heads), state = mixer.A_logs.shape, mixer.d_state
    inner = mixer.out_proj.weight.shape[1]
    raw = x @ mixer.in_proj.weight.T
    if mixer.gate:
        z, raw = raw[..., :inner], raw[..., inner:]
    steps = x @ mixer.dt_proj.weight.T
    convolved = (raw * visible.unsqueeze(-1)).movedim(-1, 1).contiguous()
    convolved = F.conv2d(convolved, mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=len(mixer.conv2d.weight))
    convolved = F.silu(convolved).movedim(1, -1)
    content = convolved[..., :inner].unflatten(-1, (heads, -1))
    into, out = convolved[..., inner : inner + state], convolved[..., inner + state :]
    delta = (1 + (steps.unflatten(-1, (num_routes, heads)) + mixer.dt_bias).exp()).log()

    images = []
    for b in range(batch):
        total = {at: mixer.Ds[:, None] * content[b][at] for at in visits("h", False, height, width)}
        for k, route in enumerate(ROUTES[mixer.scan]):
            h = x.new_zeros(heads, inner // heads, state)
            for at in visits(*route, height, width):
                if not visible[b][at]:
                    continue
                dt = delta[b][at][k]
                decay = (-dt * mixer.A_logs[k].exp()).exp()
                write = (dt[:, None] * content[b][at])[:, :, None] * into[b][at]
                h = decay[:, None, None] * h + write
                total[at] = total[at] + h @ out[b][at]
        images.append(torch.stack([total[at].flatten() for at in visits("h", False, height, width)]))
    y = torch.stack(images).view(batch, height, width, inner)
    y = F.layer_norm(y, (inner,), mixer.out_norm.weight, mixer.out_norm.bias)
    if mixer.gate:
        y = y * z * torch.sigmoid(z)
    return (y @ mixer.out_proj.weight.T) * visible.unsqueeze(-1)


def _zeroed(layers: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    """Run a stem or the layers between two stages with zeros at hidden positions before every convolution."""
    for layer in layers.children():
        if isinstance(layer, nn.Conv2d):
            scale = x.shape[2] // visible.shape[1]
            shown = visible.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            x = x * shown.unsqueeze(1)
        x = layer(x)
    return x


def features_by_loop(model: VMamba2, images: Tensor, visible: Tensor) -> Tensor:
    """Return the features of the visible patches, (B, K, C), row by row.

    Args:
        model: An encoder whose layers between the stages are convolutions.
        images: Images, (B, 3, height, width).
        visible: Whether each patch is visible, (B, rows, columns).
    """
    x = _zeroed(model.patch_embed, images, visible)
    for stage in model.layers:
        scale = x.shape[1] // visible.shape[1]
        shown = visible.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        for block in stage.blocks:
            x = x + mixed_by_loop(block.op, block.norm(x), shown)
            x = x + block.mlp(block.norm2(x))
        x = _zeroed(stage.downsample, x, visible) if isinstance(stage.downsample, nn.Sequential) else x
    x = model.classifier.norm(x)
    return torch.stack([image[shown] for image, shown in zip(x, visible, strict=True)])
