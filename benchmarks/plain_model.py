"""Our model on plain PyTorch: what a careful user would write without our kernels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gpt1_kernels import GPT1Config
from gpt1_kernels.model import GPT1Model, ModelOutput


class PlainLMHeadModel(nn.Module):
    """The parameters of `GPT1LMHeadModel` under the same names, on SDPA and ATen's ops."""

    def __init__(self, config: GPT1Config):
        super().__init__()
        self.config = config
        self.transformer = GPT1Model(config)

    def forward(self, input_ids: Tensor, labels: Tensor) -> ModelOutput:
        """(B, T), twice → loss, the mean of every token but the first, given those before it."""
        model, c = self.transformer, self.config

        def dropout(x: Tensor, p: float) -> Tensor:
            return F.dropout(x, p, self.training)

        def norm(ln: nn.LayerNorm, x: Tensor) -> Tensor:
            return F.layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)

        positions = model.positions_embed.weight[: input_ids.shape[1]]
        h = dropout(model.tokens_embed(input_ids) + positions, c.embd_pdrop)
        for block in model.h:
            qkv = block.attn.c_attn(h).chunk(3, -1)  # one copy makes its gradient
            a = F.scaled_dot_product_attention(
                *[x.unflatten(-1, (c.n_head, -1)).transpose(1, 2) for x in qkv],
                dropout_p=c.attn_pdrop if self.training else 0.0, is_causal=True,
            )  # fmt: skip
            a = block.attn.c_proj(a.transpose(1, 2).flatten(2))
            n = norm(block.ln_1, h + dropout(a, c.resid_pdrop))
            m = block.mlp.c_proj(F.gelu(block.mlp.c_fc(n), approximate="tanh"))
            h = norm(block.ln_2, n + dropout(m, c.resid_pdrop))
        logits = F.linear(h[:, :-1], model.tokens_embed.weight)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
        return ModelOutput(loss=loss)


def loss_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """A language model's loss on input_ids (B, T)."""
    return model(input_ids, labels=input_ids).loss
