# SPDX-License-Identifier: Apache-2.0
"""GPT-2's modules with fewer passes over memory; see fused_layers.py."""

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D

from ..fused import dropout_add, dropout_add_norm, norm_and_residual, project_qkv
from .fused_layers import dropout_p, is_plain, linear_gelu, product_and_bias


class GPT2Attention(stock.GPT2Attention):
    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=False,
        apart=False,
        **kwargs,
    ):
        """As in transformers; with `apart`, the output is (c_proj's product, its bias), and not dropped out.

        `GPT2Block` asks for that where "norm" is fused; where only that is, the product's input is computed as usual.
        """
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        if encoder_hidden_states is not None or past_key_values is not None or attend is None:
            return super().forward(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask,
                output_attentions, **kwargs,
            )  # fmt: skip
        if "qkv" in self.fuse and is_plain(self.c_attn, Conv1D):
            parts = project_qkv(hidden_states, [self.c_attn.weight], [self.c_attn.bias], transposed=True)
        else:
            parts = self.c_attn(hidden_states).split(self.split_size, dim=2)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (part.view(heads).transpose(1, 2) for part in parts)
        dropout = dropout_p(self.attn_dropout) if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if apart:
            return product_and_bias(self.c_proj, out), weights
        return self.resid_dropout(self.c_proj(out)), weights


class GPT2MLP(stock.GPT2MLP):
    def forward(self, hidden_states, apart=False):
        """As in transformers; with `apart`, (c_proj's product, its bias), and not dropped out."""
        hidden_states = linear_gelu(self.c_fc, self.act, hidden_states, self.fuse)
        if apart:
            return product_and_bias(self.c_proj, hidden_states)
        return self.dropout(self.c_proj(hidden_states))


class GPT2Block(stock.GPT2Block):
    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=False,
        **kwargs,
    ):
        plain = is_plain(self.attn, GPT2Attention) and is_plain(self.mlp, GPT2MLP)
        known = ALL_ATTENTION_FUNCTIONS.get(self.attn.config._attn_implementation) is not None
        if encoder_hidden_states is not None or past_key_values is not None or not plain or not known:
            return super().forward(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask,
                use_cache, **kwargs,
            )  # fmt: skip
        normal, hidden_states = norm_and_residual(hidden_states, self.ln_1)
        (product, bias), _ = self.attn(normal, attention_mask=attention_mask, apart=True, **kwargs)
        dropout = dropout_p(self.attn.resid_dropout)
        hidden_states, normal = dropout_add_norm(product, bias, hidden_states, self.ln_2, dropout)
        product, bias = self.mlp(normal, apart=True)
        return dropout_add(product, bias, hidden_states, dropout_p(self.mlp.dropout))
