# SPDX-License-Identifier: Apache-2.0
"""BERT's modules with fewer passes over memory; see fused_layers.py."""

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as stock

from ..fused import layer_norm, project_qkv
from .fused_layers import dropout_p, gelu_norm, is_plain, linear_gelu, linear_norm


class BertEmbeddings(stock.BertEmbeddings):
    def forward(
        self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, past_key_values_length=0
    ):
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            end = past_key_values_length + embeddings.shape[1]
            position_ids = self.position_ids[:, past_key_values_length:end]
        if token_type_ids is None:
            # the row itself, because the gradient of a lookup would add up B * S rows one by one
            types = self.token_type_embeddings.weight[0]
        else:
            types = self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + (self.position_embeddings(position_ids) + types)
        return self.dropout(layer_norm(embeddings, self.LayerNorm, post_norm=True))


class BertSelfAttention(stock.BertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        layers = self.query, self.key, self.value
        plain = all(is_plain(layer, nn.Linear) for layer in layers)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        if past_key_values is not None or not plain or attend is None:
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        q, k, v = project_qkv(hidden_states, weights, biases, self.attention_head_size)
        dropout = dropout_p(self.dropout) if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return out.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


class _Output:
    def forward(self, hidden_states, input_tensor):
        dropout = dropout_p(self.dropout)
        return linear_norm(self.dense, hidden_states, input_tensor, self.LayerNorm, dropout, post_norm=True)[1]


class BertSelfOutput(_Output, stock.BertSelfOutput):
    pass


class BertOutput(_Output, stock.BertOutput):
    pass


class BertIntermediate(stock.BertIntermediate):
    def forward(self, hidden_states):
        return linear_gelu(self.dense, self.intermediate_act_fn, hidden_states, self.fuse)


class BertLayer(stock.BertLayer):
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        if self.chunk_size_feed_forward or encoder_hidden_states is not None:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs
            )
        # not by way of apply_chunking_to_forward, which inspects a signature every time
        attended, _ = self.attention(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        return self.feed_forward_chunk(attended)

    def feed_forward_chunk(self, attention_output):
        first, last = self.intermediate, self.output
        if not is_plain(first, BertIntermediate) or not is_plain(last, BertOutput):
            return super().feed_forward_chunk(attention_output)
        return gelu_norm(
            first.dense, first.intermediate_act_fn, last.dense, attention_output, attention_output, last.LayerNorm,
            dropout_p(last.dropout), first.fuse, post_norm=True,
        )[1]  # fmt: skip


class BertPredictionHeadTransform(stock.BertPredictionHeadTransform):
    def forward(self, hidden_states):
        hidden_states = linear_gelu(self.dense, self.transform_act_fn, hidden_states, self.fuse)
        return layer_norm(hidden_states, self.LayerNorm) if "norm" in self.fuse else self.LayerNorm(hidden_states)
