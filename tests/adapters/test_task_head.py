"""What of a model is a new head: adapters and selections train it whole."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shoestring.adapters.placement import task_head


def test_the_new_head_is_what_stands_outside_of_the_pretrained_part():
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with torch.device("meta"):
        bert = BertForSequenceClassification(BertConfig(**tiny, vocab_size=20))
        clip = CLIPForImageClassification(CLIPConfig(vision_config=tiny, text_config=tiny))  # its own base_model
        masked = [RobertaForMaskedLM(RobertaConfig(**tiny, vocab_size=20)), BertForMaskedLM(bert.config)]
        llama = LlamaForCausalLM(LlamaConfig(**tiny, vocab_size=20))
    for model in (bert, clip):
        assert {id(p) for p in task_head(model)} == {id(p) for p in model.classifier.parameters()}
    assert [task_head(model) for model in (llama, *masked)] == [[], [], []]
    assert task_head(bert.bert) == []
