"""VMamba: stages of blocks whose mixers run selective scans along routes of a map, with argument names of timm.

Source: Liu et al., "VMamba: Visual State Space Model" (arXiv:2401.10166).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from ssmpretrain.encoders.layers.state_space import LayerNorm
from ssmpretrain.encoders.vmamba.arguments import GlobalPool, check_sizes, dims_of
from ssmpretrain.encoders.vmamba.blocks import CrossScanMixer, Downsample, NormLayer, Stem
from ssmpretrain.encoders.vmamba.encoder import StagedEncoder
from ssmpretrain.kernels.cross_scan import Mode


class VMamba(StagedEncoder):
    """Encode an image by Visual Mamba: blocks in stages scan a map along several routes.

    The first stage has one position per 4 x 4 pixels. Each further stage halves the height and the width of the map.
    Images of any height and width are accepted.

    Args:
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: Pooling before the head. "avg": the mean of all positions. "max": the maximum of each channel. "":
            none; the head reads every position.
        embed_dim: C of each stage; or C of the first stage, which then doubles from stage to stage.
        depths: Number of blocks of each stage.
        ssm_ratio: Inner channels of the mixer per channel of the stage.
        d_state: States per inner channel and route.
        dt_rank: Rank of the step size's projection; "auto" is C / 16, rounded up.
        d_conv: Side of the mixer's depthwise convolution, odd.
        conv_bias: Whether the depthwise convolution has a bias.
        gate: Multiply the scanned map by SiLU of a second projection of the mixer's input, as the first version does.
        mlp_ratio: Hidden channels of the block's MLP per channel of the stage; 0 for blocks without an MLP.
        stem: "conv" for two convolutions with 3 x 3 taps and stride 2, "patch" for one with 4 x 4 taps and stride 4.
        downsample: Layers between two stages. "conv3": a convolution with 3 x 3 taps and stride 2. "conv2": one with
            2 x 2 taps and stride 2. "merge": Swin's patch merging.
        norm_layer: Function that takes a width and returns a norm of the last axis; None is a layer norm with eps 1e-5.
        scan: Order in which the mixer reads the map. "cross" (published): along rows and along columns, forward and
            backward. "unidirectional": along rows forward, four times. "bidirectional": along rows, twice forward and
            twice backward. "cascade": along every row, then along every column. (The "cascade" of the official code
            differs: it also normalises the map before the rows, and adds the outputs of backward scans without turning
            them round. No weights were published with it.) Or a sequence of K routes, such as
            ("h", "w7", "h_flip", "w7_flip"); see `ssmpretrain.kernels.cross_scan`.
        drop_rate: Dropout on the pooled features, in [0, 1).
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1); it rises linearly from 0 at the first block.

    Raises:
        ValueError: If an argument is out of range or not one of the listed words.
    """

    # The published training decays A and the biases of the step size, because they are matrices.
    undecayed: ClassVar[tuple[str, ...]] = (".op.A_logs", ".op.Ds", ".op.dt_projs_bias")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        embed_dim: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        ssm_ratio: float = 1,
        d_state: int = 1,
        dt_rank: int | Literal["auto"] = "auto",
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        mlp_ratio: float = 4,
        stem: Stem = "conv",
        downsample: Downsample = "conv3",
        norm_layer: NormLayer | None = None,
        scan: Mode = "cross",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = dims_of(embed_dim, depths)
        name = type(self).__name__
        check_sizes(name, dims, depths, ssm_ratio, d_conv, in_chans=in_chans, d_state=d_state, dt_rank=dt_rank)
        norm_layer = norm_layer or LayerNorm

        def mixer(dim: int) -> CrossScanMixer:
            return CrossScanMixer(dim, ssm_ratio, d_state, dt_rank, d_conv, conv_bias, gate, scan, norm_layer)

        super().__init__(
            mixer,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=dims,
            depths=depths,
            mlp_ratio=mlp_ratio,
            stem=stem,
            downsample=downsample,
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
