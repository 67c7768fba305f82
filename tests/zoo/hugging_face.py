"""Small random models of Hugging Face transformers; nothing is downloaded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import nn

N, T, WORDS = 3, 4, 7


class Row(NamedTuple):
    """A model's class, its configuration, and a maker of the batch that it takes."""

    kind: type[Any]
    batch: Callable[[], dict[str, torch.Tensor]]
    config: dict[str, Any]

    def make(self):
        """The model and a batch, in float64 and without dropout."""
        torch.manual_seed(0)
        config = self.kind.config_class(**self.config)
        return self.kind(config).double().eval(), self.batch()


class Logits(nn.Module):
    """A model as a function of its inputs in a tuple, that returns its logits."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x):
        return self.model(**dict(zip(self.names, x, strict=True))).logits


def words():
    return torch.randint(1, WORDS, (N, T))


def text():
    """Some labels are ignored."""
    labels = words()
    labels[0, 2:] = -100
    return {"input_ids": words(), "labels": labels}


def padded_text():
    mask = torch.ones(N, T, dtype=torch.long)
    mask[1, 2:] = 0
    return {"input_ids": words(), "attention_mask": mask, "labels": torch.randint(3, (N,))}


def translation():
    return {"input_ids": words(), "decoder_input_ids": words(), "labels": words()}


def images():
    pixels = torch.randn(N, 3, 8, 8, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(3, (N,))}


tokens = dict(vocab_size=WORDS, bos_token_id=1, eos_token_id=2, pad_token_id=0)
layers = dict(hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2)
stages = dict(num_labels=3, hidden_sizes=[4, 6], depths=[1, 1])
patches = dict(num_labels=3, image_size=8)

MODELS = {
    "gpt2": Row(hf.GPT2LMHeadModel, text, tokens | dict(n_embd=4, n_layer=2, n_head=2)),
    "llama": Row(
        hf.LlamaForCausalLM,
        text,
        tokens | layers | dict(num_key_value_heads=1, max_position_embeddings=8),
    ),
    "bert": Row(
        hf.BertForSequenceClassification, padded_text, tokens | layers | dict(num_labels=3)
    ),
    "deberta": Row(
        hf.DebertaV2ForSequenceClassification,
        padded_text,
        tokens
        | layers
        | dict(num_labels=3, relative_attention=True, pos_att_type=["c2p", "p2c"])
        | dict(position_buckets=4),
    ),
    "opt": Row(
        hf.OPTForCausalLM,
        text,
        tokens
        | dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, ffn_dim=6)
        | dict(word_embed_proj_dim=4, max_position_embeddings=8),
    ),
    "bart": Row(
        hf.BartForConditionalGeneration,
        translation,
        tokens
        | dict(d_model=4, encoder_layers=1, decoder_layers=1, max_position_embeddings=8)
        | dict(encoder_attention_heads=2, decoder_attention_heads=2)
        | dict(encoder_ffn_dim=6, decoder_ffn_dim=6, decoder_start_token_id=1),
    ),
    "t5": Row(
        hf.T5ForConditionalGeneration,
        translation,
        dict(vocab_size=WORDS, d_model=4, d_kv=2, d_ff=6, num_layers=2, num_heads=2)
        | dict(relative_attention_num_buckets=4, decoder_start_token_id=0),
    ),
    "vit": Row(hf.ViTForImageClassification, images, patches | layers | dict(patch_size=4)),
    "resnet": Row(
        hf.ResNetForImageClassification, images, stages | dict(embedding_size=4, layer_type="basic")
    ),
    "convnext": Row(
        hf.ConvNextForImageClassification, images, stages | dict(num_stages=2, patch_size=2)
    ),
    "swin": Row(
        hf.SwinForImageClassification,
        images,
        patches | dict(patch_size=2, window_size=2, embed_dim=4, depths=[1, 2], num_heads=[1, 2]),
    ),
}
