"""A teacher behind any endpoint that speaks OpenAI's protocol: it writes queries, and lends no weights.

  prompts ──▶ [ at most `concurrency` requests ] ──▶ answers, each kept under a hash of its request

Requests that were refused for load, failed on the endpoint's side or lost their connection are tried again by
OpenAI's own client, with growing and jittered pauses. A request that was answered once is never sent again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.reasoner.engine import Prompts, Proposal
from rgalign_ray.reasoner.teachers import sampling


class OpenAIEngine:
    """Proposes queries through an endpoint.

    Args:
        teacher: model, endpoint and limits.
        shared: sampling settings, where the teacher has none of its own.
        cache_uri: folder that keeps the answers, each teacher's in a folder of its own, and what they have cost.

    Raises:
        ConfigError: without the package `openai`.
    """

    def __init__(self, teacher: config.Teacher, shared: config.Sampling, cache_uri: str) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigError(
                f"teachers.{teacher.name}: engine openai needs the package openai; pip install 'rgalign_ray[openai]'."
            ) from None
        self.teacher, self.endpoint = teacher, teacher.endpoint
        self.cache_uri = storage.join(cache_uri, teacher.name)
        drawn = sampling(teacher, shared)
        self.sampling = {"max_tokens": drawn.max_new_tokens, "temperature": drawn.temperature, "top_p": drawn.top_p}
        self.tokens = 0 if self.endpoint.max_tokens is None else self._tokens_before()
        self._openai = openai

    def propose(self, prompts: Prompts, seeds: Sequence[Sequence[int]]) -> list[list[Proposal | None]]:
        """A proposal per prompt and seed; None where the endpoint's tokens were used up before.

        Raises:
            ConfigError: when the endpoint refuses the key, the model or the request.
            InfrastructureError: when it does not answer in spite of all retries.
        """
        return asyncio.run(self._all(prompts, seeds))

    async def _all(self, prompts: Prompts, seeds: Sequence[Sequence[int]]) -> list[list[Proposal | None]]:
        gate = asyncio.Semaphore(self.endpoint.concurrency)
        requests = [
            [self._request(prompts, text, seed) for seed in row] for text, row in zip(prompts.texts, seeds, strict=True)
        ]
        async with self._openai.AsyncOpenAI(
            base_url=self.endpoint.base_url,
            api_key=self._key,
            max_retries=self.endpoint.retries,
            timeout=self.endpoint.deadline_s,
        ) as client:
            rows = [asyncio.gather(*(self._answer(client, gate, request) for request in row)) for row in requests]
            return [list(row) for row in await asyncio.gather(*rows)]

    @property
    def _key(self) -> str:
        return os.environ.get(self.endpoint.key_variable) or "none"  # the client insists on one

    def _request(self, prompts: Prompts, text: str, seed: int) -> dict[str, Any]:
        shared = {"model": self.teacher.model, "seed": seed % 2**31, **self.sampling}
        if self.endpoint.api == "completions":
            return {**shared, "prompt": prompts.prefix + text + prompts.suffix, "stop": ["\n"]}
        messages = [
            {"role": "system", "content": prompts.prefix.strip()},
            {"role": "user", "content": (text + prompts.suffix).strip()},
        ]
        return {**shared, "messages": messages}

    async def _answer(self, client: Any, gate: asyncio.Semaphore, request: dict[str, Any]) -> Proposal | None:
        place = storage.join(self.cache_uri, f"{storage.content_key(self.endpoint.base_url, request)}.json")
        if storage.exists(place):
            found = storage.read_json(place)
            return Proposal(found["query"], found["finish"])
        async with gate:
            if self.endpoint.max_tokens is not None and self.tokens >= self.endpoint.max_tokens:
                return None
            proposal, tokens = await self._ask(client, request)
        storage.write_json(place, {"query": proposal.query, "finish": proposal.finish, "tokens": tokens})
        return proposal

    def _tokens_before(self) -> int:
        """What the answers that are kept have cost: the budget is the run's, however often it is resumed."""
        return sum(storage.read_json(place)["tokens"] for place in storage.list_files(self.cache_uri, ".json"))

    async def _ask(self, client: Any, request: dict[str, Any]) -> tuple[Proposal, int]:
        """The endpoint's proposal, and the tokens that it took."""
        where = f"teachers.{self.teacher.name}: {self.endpoint.base_url}"
        ask = client.chat.completions.create if self.endpoint.api == "chat" else client.completions.create
        try:
            answer = await ask(**request)
        except (self._openai.AuthenticationError, self._openai.PermissionDeniedError):
            # without the endpoint's own words, which may quote the key
            raise ConfigError(f"{where} refuses the key in ${self.endpoint.key_variable}.") from None
        except (
            self._openai.APIConnectionError,
            self._openai.RateLimitError,
            self._openai.InternalServerError,
        ) as error:
            raise InfrastructureError(
                f"{where} did not answer after {self.endpoint.retries} retries ({type(error).__name__}); the same "
                "command goes on from the answers that are there."
            ) from None
        except self._openai.APIStatusError as error:
            said = _short(error.message.replace(self._key, "…"))
            raise ConfigError(f"{where} refuses the request ({error.status_code}: {said}).") from None
        except ValueError:
            answer = None
        if not getattr(answer, "choices", None):
            raise ConfigError(
                f"{where} gives no answer of OpenAI's protocol; see that "
                f"teachers.{self.teacher.name}.endpoint.base_url is right, which mostly ends in /v1."
            )
        tokens = answer.usage.total_tokens if answer.usage else _at_most(request)
        self.tokens += tokens
        choice = answer.choices[0]
        text = choice.message.content if self.endpoint.api == "chat" else choice.text
        lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
        return Proposal(lines[0] if lines else "", "length" if choice.finish_reason == "length" else "stop"), tokens


def _at_most(request: dict[str, Any]) -> int:
    """No fewer tokens than an answer takes whose endpoint does not count them: none holds less than a byte."""
    asked = [request["prompt"]] if "prompt" in request else [message["content"] for message in request["messages"]]
    return sum(len(text.encode()) for text in asked) + int(request["max_tokens"])


def _short(message: str, most: int = 200) -> str:
    text = " ".join(message.split())
    return text if len(text) <= most else text[:most] + "…"
