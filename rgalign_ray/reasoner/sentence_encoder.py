"""A sentence encoder behind the engine's protocol: it embeds texts, and writes none.

Rivals and auditors read sessions with it, so that a gain of the reasoner is a gain over what any small
encoder would have given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rgalign_ray import config
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Group, Prompts, Sample


class SentenceEncoder:
    """Mean of the last hidden states over a text's tokens, of unit length (Reimers and Gurevych 2019).

    Args:
        settings: model, device and threads; weights are used as they are stored.
        max_session_tokens: tokens of a session text that are read; the rest is cut off its end.
    """

    def __init__(self, settings: config.Reasoner, max_session_tokens: int) -> None:
        from transformers import AutoModel

        torch.set_num_threads(settings.threads)
        self.device = models.device(settings)
        self.max_session_tokens = max_session_tokens
        self.tokenizer = models.load_tokenizer(settings.model)
        self.model = AutoModel.from_pretrained(models.resolve(settings.model)).eval().to(self.device)
        self.version = settings.model
        self.hidden_size: int = self.model.config.hidden_size

    @torch.inference_mode()
    def embed(self, prompts: Prompts, completions: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        """float16 [len(prompts.texts), H] of the session texts alone: an instruction means nothing to an encoder."""
        assert completions is None, "a sentence encoder reads texts, not token ids of another model"
        tokens = self.tokenizer(
            list(prompts.texts),
            padding=True,
            truncation=True,
            max_length=self.max_session_tokens,
            return_tensors="pt",
        ).to(self.device)
        states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().to(torch.float16).numpy()

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> list[Group]:
        raise NotImplementedError("a sentence encoder writes no queries")

    def read(self, prompts: Prompts, queries: Sequence[str]) -> list[Sample]:
        raise NotImplementedError("a sentence encoder has no tokens to learn from")

    def load(self, weights: str | None) -> None:
        assert weights is None, "a sentence encoder is not aligned"


def joined(queries: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Query and session as one text, which an encoder reads as e(x,q); the query first, since ends are cut off."""
    return [f"{query} {text}" for query, text in zip(queries, texts, strict=True)]
