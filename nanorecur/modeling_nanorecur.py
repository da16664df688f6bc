"""
A model of nanoRecur as transformers opens it: AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True). pretrained.export copies this file into the folder, beside model.py.

config.gpt holds the fields of GPTConfig without loop counts. config.n_loop is the loops of every
group, or a list with those of each; from_pretrained(folder, n_loop=8, trust_remote_code=True) and
model(input_ids, n_loop=8) change it. There is no cache of keys and values: generate computes all
tokens again for each new one.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import GPT, GPTConfig


class NanoRecurConfig(PretrainedConfig):
    model_type = "nanorecur"

    def __init__(self, gpt: dict | None = None, n_loop: int | list = 1, **others):
        self.gpt, self.n_loop = gpt or {}, n_loop
        super().__init__(**others)


class NanoRecurForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoRecurConfig
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.transformer.wte.weight"}

    def __init__(self, config: NanoRecurConfig):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.gpt.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate makes no cache, even with use_cache=True

    def _init_weights(self, module: nn.Module) -> None:
        """Fill the tables that no file holds, as of rotary positions: the model began on meta."""
        for name in module._non_persistent_buffers_set:
            table = getattr(type(module)(self.gpt.config), name)
            getattr(module, name).copy_(table)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        n_loop: int | list | None = None,
        logits_to_keep: int = 0,
        **others,
    ) -> CausalLMOutput:
        """Return the loss of labels (B, T), and logits (B, T, V) or of the last logits_to_keep.

        Rows with padding on the left are computed one by one, without it.
        """
        n_loop = n_loop or self.config.n_loop
        if attention_mask is None or attention_mask[:, 0].all():
            x = self.gpt.hidden(input_ids, n_loop)
        else:
            rows = zip(input_ids, attention_mask.bool())
            x = torch.cat([self.without_padding(ids, keep, n_loop) for ids, keep in rows])
        logits, loss = self.gpt.logits(x[:, -logits_to_keep:]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.size(-1))
        return CausalLMOutput(loss=loss, logits=logits)

    def without_padding(self, ids: Tensor, keep: Tensor, n_loop: int | list) -> Tensor:
        """Return the last hidden states (1, T, C) of ids (T,); 0 for padding, where keep is 0."""
        x = self.gpt.hidden(ids[keep][None], n_loop)
        return F.pad(x, (0, 0, len(ids) - x.size(1), 0))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> dict:
        """Return the inputs of forward: of long texts the last block_size tokens."""
        size = self.gpt.block_size
        mask = None if attention_mask is None else attention_mask[:, -size:]
        return {"input_ids": input_ids[:, -size:], "attention_mask": mask, **kwargs}
