"""Sampling and embedding with transformers: one prefill per prompt, from which its N samples go on.

The instruction in front of every session text is computed once per version of the weights. Session
texts are padded between the instruction and themselves, so the last token of every row is its last
column; attention masks and explicit positions make the padding invisible. Left out on purpose:
continuous batching (vLLM's job).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.reasoner import continuation, models, reading
from rgalign_ray.reasoner.engine import Group, Prompts, Sample, written

TOP_TOKENS = 256
"""Tokens looked at first when cutting to top-p; rows whose mass lies further out are sorted whole."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """What a pass over prompts leaves."""

    last: torch.Tensor
    """[B, H], from which the first token is predicted."""
    read: torch.Tensor
    """[B, T, H], states at `reasoner.depth` of what stands behind the prefix, padded on the left."""
    cache: DynamicCache
    mask: torch.Tensor
    """[B, T'] of the cache."""


class TransformersEngine:
    """A reasoner run by transformers on one device.

    Args:
        settings: model, dtype, device and threads.
        max_session_tokens: tokens of a session text that are read; the rest is cut off its end.
        weights: URI of a reasoner artefact; None for the base model.
    """

    def __init__(self, settings: config.Reasoner, max_session_tokens: int, weights: str | None = None) -> None:
        torch.set_num_threads(settings.threads)
        self.device = models.device(settings)
        self.settings = settings
        self.max_session_tokens = max_session_tokens
        self.tokenizer = models.load_tokenizer(settings.model)
        self.stop_ids = stop_tokens(self.tokenizer)
        self._weights = models.Weights(models.load_base(settings).to(self.device), settings)
        self.load(weights)

    def load(self, weights: str | None) -> None:
        self._weights.take(weights)
        self.use(self._weights.model, models.version_of(self.settings, weights))

    def use(self, model: PreTrainedModel, version: str) -> None:
        """Goes on with the weights of a model in memory, as they are now: what was computed by others is forgotten."""
        self.model = model
        self._forward = reading.forward(model, self.settings)
        self.version = version
        self.hidden_size: int = model.config.hidden_size
        sliding = getattr(model.config, "layer_types", None) or ["sliding_attention"]
        self._window = getattr(model.config, "sliding_window", None) if "sliding_attention" in sliding else None
        self._prefix: tuple[str, list[tuple[torch.Tensor, torch.Tensor]], int] | None = None

    def prompt_ids(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of whole prompts. Their three parts are tokenised apart, so that the first is shared."""
        prefix = self._ids(prompts.prefix)
        return [prefix + tail for tail in self._tails(prompts)]

    @torch.inference_mode()
    def embed(self, prompts: Prompts, completions: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        tails = self._tails(prompts)
        queries = [[]] * len(tails) if completions is None else [self._content(ids) for ids in completions]
        rows = [tail + query for tail, query in zip(tails, queries, strict=True)]
        prefill = self._prefill(prompts.prefix, rows)
        vectors = self._pooled(prefill.read, tails, queries)
        finite(vectors[[number for number, query in enumerate(queries) if not query]])
        return half(vectors)

    def read(self, prompts: Prompts, queries: Sequence[str]) -> list[Sample]:
        completions = [written(self.tokenizer, query, prompts.suffix) for query in queries]
        vectors = self.embed(prompts, completions)
        return [
            Sample(query, ids, [], "stop", 0, vector)
            for query, ids, vector in zip(queries, completions, vectors, strict=True)
        ]

    @torch.inference_mode()
    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> list[Group]:
        n = len(seeds[0])
        flat_seeds = [seed for group in seeds for seed in group]
        tails = self._tails(prompts)
        prefill = self._prefill(prompts.prefix, tails)
        read = self._pooled(prefill.read, tails, [[]] * len(tails))
        lengths = [len(reading.tokens(self.settings, 0, len(tail), 0)[0]) for tail in tails]
        decoded = self._decode(
            prefill.last.repeat_interleave(n, dim=0),
            read.repeat_interleave(n, dim=0),
            torch.tensor(lengths, device=self.device).repeat_interleave(n)[:, None],
            continuation.of(self.model, self._forward, prefill.cache, prefill.mask, n, sampling.max_new_tokens),
            uniforms(flat_seeds, sampling.max_new_tokens).to(self.device),
            sampling,
        )
        samples = [Sample(**row, seed=seed) for row, seed in zip(decoded, flat_seeds, strict=True)]
        return [
            Group(ids, embedding, samples[i * n : (i + 1) * n])
            for i, (ids, embedding) in enumerate(zip(self.prompt_ids(prompts), finite(read), strict=True))
        ]

    def _decode(
        self,
        hidden: torch.Tensor,
        read: torch.Tensor,
        count: torch.Tensor,
        rows: continuation.Continuation,
        uniform: torch.Tensor,
        sampling: config.Sampling,
    ) -> list[dict]:
        """Samples every row to its stop token or its end.

        Args:
            hidden: [R, H], state of the prompt's last token.
            read: [R, H], e(x).
            count: [R, 1], how many tokens that is of.
            uniform: [R, steps]
        """
        total, steps = uniform.shape
        ids: list[list[int]] = [[] for _ in range(total)]
        logprobs: list[list[float]] = [[] for _ in range(total)]
        finish = ["length"] * total
        summed = read * count
        alive = torch.arange(total, device=self.device)
        stops = torch.tensor(sorted(self.stop_ids), dtype=torch.long, device=self.device)
        for step in range(steps):
            logits = self.model.lm_head(hidden).float() / sampling.temperature
            tokens = choose(logits, uniform[alive, step], sampling.top_p)
            picked = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
            for row, token, logprob in zip(alive.tolist(), tokens.tolist(), picked.tolist(), strict=True):
                ids[row].append(token)
                logprobs[row].append(logprob)
            going = ~torch.isin(tokens, stops)
            for row in alive[~going].tolist():
                finish[row] = "stop"
            if not going.any():
                break
            if not going.all():  # finished rows leave the batch
                keep = going.nonzero()[:, 0]
                alive, tokens = alive[keep], tokens[keep]
                rows.keep(keep)
            hidden, states = rows.step(tokens)
            if self.settings.pooling == "mean":
                summed[alive] += states.float()
                count[alive] += 1
            else:
                summed[alive] = states.float()
        embeddings = half(summed / count)
        return [
            {
                "query": self.tokenizer.decode(self._content(ids[row]), skip_special_tokens=True).strip(),
                "completion_ids": ids[row],
                "logprobs": logprobs[row],
                "finish": finish[row],
                "embedding": embeddings[row],
            }
            for row in range(total)
        ]

    def _prefill(self, prefix: str, rows: list[list[int]]) -> Prefill:
        """Token rows behind the shared prefix."""
        keys_values, prefix_length = self._prefix_cache(prefix)
        width = max(len(row) for row in rows)
        window = self._window
        if window and prefix_length + width > window:  # padding stands in the cache, and would count
            raise ConfigError(
                f"reasoner.model: '{self.settings.model}' looks {window} tokens back, and a prompt has "
                f"{prefix_length + width}; choose a model that sees all of it, or shorten prompt.template."
            )
        pad = self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.ones(len(rows), prefix_length + width, dtype=torch.long, device=self.device)
        for i, row in enumerate(rows):
            mask[i, prefix_length : prefix_length + width - len(row)] = 0
        cache = DynamicCache(
            [(k.expand(len(rows), -1, -1, -1), v.expand(len(rows), -1, -1, -1)) for k, v in keys_values]
        )
        last, read = self._states(tokens, mask, cache)
        return Prefill(last[:, -1], read, cache, mask)

    def _pooled(self, read: torch.Tensor, tails: list[list[int]], queries: list[list[int]]) -> torch.Tensor:
        """float32 [B, H], e(x,q), e(x) where there is no query: of states [B, T, H] that end in a tail and a query."""
        vectors = []
        for states, tail, query in zip(read, tails, queries, strict=True):
            first = len(states) - len(tail) - len(query)
            _, chosen = reading.tokens(self.settings, 0, len(tail), len(query))
            vectors.append(states[first + chosen.start : first + chosen.stop].float().mean(dim=0))
        return torch.stack(vectors)

    def _prefix_cache(self, prefix: str) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
        if self._prefix is None or self._prefix[0] != prefix:
            tokens = torch.tensor([self._ids(prefix)], dtype=torch.long, device=self.device)
            cache = DynamicCache()
            if tokens.numel():
                self._states(tokens, torch.ones_like(tokens), cache)
            self._prefix = (prefix, [(layer.keys, layer.values) for layer in cache.layers], tokens.shape[1])
        return self._prefix[1], self._prefix[2]

    def _states(
        self, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both states [B, T, H] of new tokens, as `Forward` has them; positions count the visible ones."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self._forward(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )

    def _tails(self, prompts: Prompts) -> list[list[int]]:
        suffix = self._ids(prompts.suffix)
        tails = [self._ids(text)[: self.max_session_tokens] + suffix for text in prompts.texts]
        if not all(tails):
            raise ConfigError("prompt.template: a text is empty, and so is the suffix; there is nothing to read.")
        return tails

    def _content(self, completion: Sequence[int]) -> list[int]:
        return [token for token in completion if token not in self.stop_ids]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def half(vectors: torch.Tensor) -> np.ndarray:
    """As embeddings are kept: float16. A query whose embedding is beyond that is one that must not be judged."""
    return vectors.cpu().to(torch.float16).numpy()


def finite(vectors: torch.Tensor) -> np.ndarray:
    """The same of sessions, which all have an e(x).

    Raises:
        ConfigError: for numbers beyond float16, which some large models have before their last norm, and for none.
    """
    kept = half(vectors)
    if not np.isfinite(kept).all():
        raise ConfigError(
            "reasoner.depth: this model's states are too large there to be kept, or no numbers; set it to 1.0, or "
            "reasoner.dtype to float32."
        )
    return kept


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a latent query: the end of the turn or text, and whatever holds a line break."""
    specials = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    # byte-level vocabularies write the line break as Ċ, sentencepiece ones as <0x0A>
    breaks = {i for token, i in tokenizer.get_vocab().items() if "Ċ" in token or "\n" in token or token == "<0x0A>"}
    return {token for token in specials | breaks if token is not None}


def uniforms(seeds: Sequence[int], steps: int) -> torch.Tensor:
    """Uniform numbers [len(seeds), steps], each row from its own generator: a row's draw knows no batch."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(seed)).random(steps) for seed in seeds]))


def choose(logits: torch.Tensor, uniform: torch.Tensor, top_p: float) -> torch.Tensor:
    """Nucleus sampling by inverse transform: tokens [R] from logits [R, V] and uniform numbers [R] in [0, 1).

    The nucleus is the shortest list of most probable tokens whose mass reaches `top_p` (Holtzman et al.,
    2020); each row depends on its own logits and number alone.
    """
    probabilities = torch.softmax(logits, dim=-1)
    if top_p >= 1:  # all are in the nucleus, and nothing needs to be ranked
        return _draw(probabilities.double(), uniform)
    top, index = probabilities.topk(min(TOP_TOKENS, logits.shape[-1]), dim=-1)
    tokens = _pick(top, index, uniform, top_p)
    far = top.sum(dim=-1) < top_p
    if far.any():
        ranked, order = probabilities[far].sort(dim=-1, descending=True, stable=True)
        tokens[far] = _pick(ranked, order, uniform[far], top_p)
    return tokens


def _pick(ranked: torch.Tensor, index: torch.Tensor, uniform: torch.Tensor, top_p: float) -> torch.Tensor:
    """Inverse transform over the nucleus of probabilities [R, K] in descending order.

    The numbers are laid over the nucleus in the vocabulary's order: by probability, two tokens of nearly
    equal ones would change places with the last bit of a logit, and the draw with them.
    """
    inside = (ranked.double().cumsum(dim=-1) - ranked) < top_p
    index, order = index.sort(dim=-1)
    place = _draw(torch.where(inside, ranked.double(), 0.0).gather(1, order), uniform)
    return index.gather(1, place[:, None])[:, 0]


def _draw(mass: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Places [R] in rows of mass [R, K] that the numbers [R] fall on."""
    until = mass.cumsum(dim=-1)
    return torch.searchsorted(until, uniform[:, None] * until[:, -1:], right=True)[:, 0].clamp(max=mass.shape[-1] - 1)
