"""Text tower of one-directional Mamba blocks, in the place of CLIP's causal Transformer.

T texts, L tokens, D channels, E width of the common space
"""

import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.vim.blocks import VimBlocks
from ssmpretrain.kernels.transforms import is_jit_tracing


class MambaText(nn.Module):
    """Embed the tokens of a text, scan them from first to last, and project the features of the end token.

    There is no position embedding, because a scan depends on the order of the tokens. A token depends only on itself
    and the tokens before it, so the tokens after the last end token of a batch are not computed.

    Args:
        context_length: Largest number L of tokens in a text, at least 1.
        vocab_size: Number of different tokens; the highest number is the end token.
        width: D.
        layers: Number of blocks.
        output_dim: E.

    Source: Gu & Dao, "Mamba" (arXiv:2312.00752), section 3.4, for the blocks; Radford et al., "CLIP"
        (arXiv:2103.00020), section 2.4, for the end token, the projection and their initial values.
    """

    def __init__(self, context_length: int, vocab_size: int, width: int, layers: int, output_dim: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.blocks = VimBlocks(layers, width, bidirectional="none")
        self.text_projection = nn.Linear(width, output_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed texts as vectors that are not normalised.

        Args:
            tokens: Token numbers, (T, L), int64; L is at most `context_length`.

        Returns:
            One vector per text, (T, E).

        Raises:
            ValueError: If the texts have more tokens than `context_length`.
        """
        if tokens.shape[1] > self.context_length:
            raise UserError(
                f"MambaText: texts have at most {self.context_length} tokens; got {tokens.shape[1]}. "
                "Tokenise for this context length."
            )
        if not len(tokens):
            return self.text_projection(self.token_embedding(tokens[:, 0]))  # type: ignore[no-any-return]
        end = tokens.argmax(dim=1)  # the first end token of a text
        if not is_jit_tracing():  # a traced graph would cut later batches at this length too
            tokens = tokens[:, : int(end.max()) + 1]
        features = self.blocks(self.token_embedding(tokens))
        return self.text_projection(features[torch.arange(end.shape[0], device=end.device), end])  # type: ignore[no-any-return]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay, all of them in the blocks."""
        return {f"blocks.{name}" for name in self.blocks.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing of the blocks on or off; see `BlockStack.set_grad_checkpointing`."""
        self.blocks.set_grad_checkpointing(enable)
