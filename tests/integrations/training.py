"""Small models and real data that several tests train with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from sklearn.datasets import load_digits

from ckptvcs.testing.same import difference


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of handwritten digits, float32 [1797, 1, 8, 8], and what they show, int64 [1797]."""
    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return pictures, torch.tensor(found.target)


class Digits(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The digits as a vision transformer of transformers takes them."""

    def __init__(self) -> None:
        self.pictures, self.labels = digits()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pictures[index], "labels": self.labels[index]}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The digits as text: 64 words each, of 17 shades."""

    def __init__(self) -> None:
        pictures, self.labels = digits()
        self.words = (pictures.flatten(1) * 16).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def reading_model(hidden: int = 32) -> Any:
    """A text classifier of transformers for `Rows`, with dropout.

    Its files have the names of its state, which HF's Trainer needs to resume from them: parts of a vision
    transformer are renamed on the way.
    """
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=17,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=64,
            num_labels=10,
        )
    )


def vision_model(hidden: int = 32) -> Any:
    """A vision transformer for 8 x 8 pictures with random weights and dropout."""
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=hidden, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=2 * hidden, num_labels=10, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def language_model(kind: str = "gpt2") -> Any:
    """A language model with random weights; the output layer of gpt2 is tied to its embedding."""
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=211, n_positions=32, n_embd=32, n_layer=2, n_head=2)
        )
    if kind == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=211,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                dtype="bfloat16",
            )
        ).to(torch.bfloat16)
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=211,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        )
    assert kind == "bert"
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=211,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )


def same_parameters(one: Any, other: Any) -> bool:
    """Whether two modules hold the same tensors, bit for bit."""
    return difference(dict(one.state_dict()), dict(other.state_dict())) is None
