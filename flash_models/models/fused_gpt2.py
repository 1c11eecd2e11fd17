# SPDX-License-Identifier: Apache-2.0
"""GPT-2's modules with fewer passes over memory; see fused_layers.py."""

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D

from ..fused import norm_and_residual, project_qkv
from .fused_layers import dropout_p, gelu_norm, is_plain, linear_gelu, linear_norm


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
        """As in transformers; with `apart`, the output is what c_proj reads.

        `GPT2Block` asks for that where "norm" is fused; where only that is, the rest is computed as usual.
        """
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        if encoder_hidden_states is not None or past_key_values is not None or attend is None:
            return super().forward(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask,
                output_attentions, **kwargs,
            )  # fmt: skip
        if "qkv" in self.fuse and is_plain(self.c_attn, Conv1D):
            weights, biases = [self.c_attn.weight], [self.c_attn.bias]
            q, k, v = project_qkv(hidden_states, weights, biases, self.head_dim, transposed=True)
        else:
            heads = (*hidden_states.shape[:-1], -1, self.head_dim)
            parts = self.c_attn(hidden_states).split(self.split_size, dim=2)
            q, k, v = (part.view(heads).transpose(1, 2) for part in parts)
        dropout = dropout_p(self.attn_dropout) if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if apart:
            return out, weights
        return self.resid_dropout(self.c_proj(out)), weights


class GPT2MLP(stock.GPT2MLP):
    def forward(self, hidden_states):
        return self.dropout(self.c_proj(linear_gelu(self.c_fc, self.act, hidden_states, self.fuse)))


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
        attn, mlp = self.attn, self.mlp
        out, _ = attn(normal, attention_mask=attention_mask, apart=True, **kwargs)
        hidden_states, normal = linear_norm(attn.c_proj, out, hidden_states, self.ln_2, dropout_p(attn.resid_dropout))
        dropout = dropout_p(mlp.dropout)
        return gelu_norm(mlp.c_fc, mlp.act, mlp.c_proj, normal, hidden_states, None, dropout, mlp.fuse)[0]
