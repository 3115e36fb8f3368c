"""Sampling with one prefill per prompt gives what sampling each alone would give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.reasoner import models, transformers_engine
from rgalign_ray.reasoner.engine import Prompts, sample_seed
from rgalign_ray.reasoner.transformers_engine import TransformersEngine, choose, stop_tokens, uniforms
from rgalign_ray.reward.functions import fault

SAMPLING = config.Sampling(temperature=0.7, top_p=0.95, max_new_tokens=24)
TEXTS = ["to receive, 7 days", "paid twice", "refund?", "the parcel was returned to the hub, number unknown"]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(config.Reasoner(model="tiny", dtype="float32"), max_session_tokens=64)


def prompts(texts: list[str], prefix: str = "What is asked?\n") -> Prompts:
    return Prompts(prefix, texts, "\nQuestion:")


def seeds(texts: list[str], n: int = 3) -> list[list[int]]:
    return [[sample_seed(0, 1, text, number) for number in range(n)] for text in texts]


def test_fanned_out_samples_equal_those_sampled_alone(engine: TransformersEngine) -> None:
    together = engine.sample(prompts(TEXTS), seeds(TEXTS), SAMPLING)
    for text, group in zip(TEXTS, together, strict=True):
        for seed, sample in zip(seeds([text])[0], group.samples, strict=True):
            alone = engine.sample(prompts([text]), [[seed]], SAMPLING)[0].samples[0]
            assert (sample.completion_ids, sample.finish, sample.query) == (
                alone.completion_ids,
                alone.finish,
                alone.query,
            )
            np.testing.assert_allclose(sample.logprobs, alone.logprobs, atol=1e-5)
            np.testing.assert_allclose(sample.embedding, alone.embedding, atol=2e-3)
    assert {sample.finish for group in together for sample in group.samples} == {"stop", "length"}


def test_samples_equal_a_plain_loop_without_cache_or_batch(engine: TransformersEngine) -> None:
    """The reference: the whole sequence through the model at every step, one sample at a time."""
    group = engine.sample(prompts(TEXTS[:1]), seeds(TEXTS[:1]), SAMPLING)[0]
    for seed, sample in zip(seeds(TEXTS[:1])[0], group.samples, strict=True):
        ids, logprobs = list(group.prompt_ids), []
        for number in uniforms([seed], SAMPLING.max_new_tokens)[0]:
            with torch.inference_mode():
                logits = engine.model(torch.tensor([ids])).logits[:, -1] / SAMPLING.temperature
            ids.append(int(choose(logits, number[None], SAMPLING.top_p)))
            logprobs.append(float(logits.log_softmax(dim=-1)[0, ids[-1]]))
            if ids[-1] in engine.stop_ids:
                break
        assert ids[len(group.prompt_ids) :] == sample.completion_ids
        np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4)


def test_embeddings_of_the_sampling_pass_equal_those_read_afresh(engine: TransformersEngine) -> None:
    groups = engine.sample(prompts(TEXTS), seeds(TEXTS, 1), SAMPLING)
    fresh = engine.embed(prompts(TEXTS))
    np.testing.assert_allclose(np.stack([g.embedding for g in groups]), fresh, atol=2e-3)
    completions = [g.samples[0].completion_ids for g in groups]
    queried = engine.embed(prompts(TEXTS), completions)
    np.testing.assert_allclose(np.stack([g.samples[0].embedding for g in groups]), queried, atol=2e-3)
    assert np.abs(queried - fresh).max() > 0.1


@pytest.mark.parametrize(("depth", "layer"), [(0.5, 1), (0.7, 1), (0.9, 2), (1.0, 2)])
def test_embeddings_are_means_of_a_text_s_states_in_the_plain_model(depth: float, layer: int) -> None:
    settings = config.Reasoner(model="tiny", dtype="float32", depth=depth)
    engine = TransformersEngine(settings, max_session_tokens=64)
    assert engine.model.config.num_hidden_layers == 2
    ids, prefix = engine.prompt_ids(prompts(TEXTS)), len(engine._ids(prompts(TEXTS).prefix))
    queries = [engine._ids(" why?\n"), [], engine._ids("\n"), engine._ids(" it")]
    alone, queried = engine.embed(prompts(TEXTS)), engine.embed(prompts(TEXTS), queries)
    for row, query, e_x, e_xq in zip(ids, queries, alone, queried, strict=True):
        written = [token for token in query if token not in engine.stop_ids]
        with torch.inference_mode():
            output = engine.model.model(torch.tensor([row + written]), output_hidden_states=True)
        states = output.last_hidden_state[0] if layer == 2 else output.hidden_states[layer][0]
        np.testing.assert_allclose(e_x, states[prefix : len(row)].mean(dim=0), atol=2e-3)
        np.testing.assert_allclose(e_xq, states[prefix:].mean(dim=0), atol=2e-3)


def test_an_embedding_may_be_the_last_hidden_state_of_the_plain_model() -> None:
    settings = config.Reasoner(model="tiny", dtype="float32", pooling="last", depth=1.0)
    engine = TransformersEngine(settings, max_session_tokens=64)
    groups = engine.sample(prompts(TEXTS), seeds(TEXTS, 1), SAMPLING)
    for row, vector, group in zip(engine.prompt_ids(prompts(TEXTS)), engine.embed(prompts(TEXTS)), groups, strict=True):
        written = engine._content(group.samples[0].completion_ids)
        with torch.inference_mode():
            states = engine.model.model(torch.tensor([row + written])).last_hidden_state[0]
        np.testing.assert_allclose(vector, states[len(row) - 1], atol=2e-3)
        np.testing.assert_allclose(group.samples[0].embedding, states[-1], atol=2e-3)


def test_states_that_cannot_be_kept_are_refused() -> None:
    engine = TransformersEngine(config.Reasoner(model="tiny", dtype="float32", depth=0.5), max_session_tokens=64)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight.mul_(1e7)
    with pytest.raises(ConfigError, match=r"reasoner\.depth: .* set it to 1\.0"):
        engine.embed(prompts(TEXTS))


def test_a_query_whose_states_cannot_be_kept_is_one_that_must_not_be_judged(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = engine._pooled

    def beyond(read: torch.Tensor, tails: list[list[int]], queries: list[list[int]]) -> torch.Tensor:
        large = torch.tensor([1e9 if query else 1.0 for query in queries])
        return pooled(read, tails, queries) * large[:, None]

    monkeypatch.setattr(engine, "_pooled", beyond)
    (sample,) = engine.read(prompts(TEXTS[:1]), ["Where is it?"])
    assert fault(sample) == "non_finite"
    assert np.isfinite(engine.embed(prompts(TEXTS[:1]))).all()


@pytest.mark.parametrize(("suffix", "space"), [("\nQuestion:", " "), ("\nQuestion: ", "")])
def test_what_others_wrote_is_read_as_if_it_were_its_own(engine: TransformersEngine, suffix: str, space: str) -> None:
    asked = Prompts("What is asked?\n", TEXTS[:2], suffix)
    queries = ["where is my parcel?", "I paid twice"]
    found = engine.read(asked, queries)
    assert [sample.query for sample in found] == queries
    for sample in found:
        assert engine.tokenizer.decode(sample.completion_ids) == f"{space}{sample.query}\n"
        assert sample.completion_ids[-1] in engine.stop_ids, "to be learned as a whole query"
        assert sample.logprobs == [], "it is not known how likely the policy was to write it"
    expected = engine.embed(asked, [sample.completion_ids for sample in found])
    np.testing.assert_allclose(np.stack([sample.embedding for sample in found]), expected, atol=2e-3)


def test_the_prefix_is_computed_once(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.embed(prompts(TEXTS, "another instruction: "))
    lengths = []
    states = engine._states

    def counted(tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        lengths.append(tokens.shape[1])
        return states(tokens, mask, cache)

    monkeypatch.setattr(engine, "_states", counted)
    engine.embed(prompts(TEXTS, "another instruction: "))
    assert lengths == [max(len(engine._ids(text)) for text in TEXTS) + len(engine._ids("\nQuestion:"))]


def test_what_is_computed_of_the_prefix_is_of_the_weights_that_there_are(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    other = models.load_base(engine.settings)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.ones_like(parameter))
    other.save_pretrained(tmp_path, safe_serialization=True)
    models.describe(str(tmp_path), base="tiny", version="other", adapter=False)
    moved, fresh = (TransformersEngine(engine.settings, 64, weights) for weights in (None, str(tmp_path)))
    before = moved.embed(prompts(TEXTS))
    moved.load(str(tmp_path))
    np.testing.assert_array_equal(moved.embed(prompts(TEXTS)), fresh.embed(prompts(TEXTS)))
    moved.load(None)
    np.testing.assert_array_equal(moved.embed(prompts(TEXTS)), before)


def test_a_prompt_without_instruction_is_read_too(engine: TransformersEngine) -> None:
    assert engine.embed(Prompts("", ["Speed up parcel delivery"], "")).shape == (1, engine.hidden_size)


def test_session_text_is_cut_at_its_end() -> None:
    short = TransformersEngine(config.Reasoner(model="tiny", dtype="float32"), max_session_tokens=5)
    long, cut = prompts(["abcdefgh"]), prompts(["abcde"])
    assert short.prompt_ids(long) == short.prompt_ids(cut)
    np.testing.assert_array_equal(short.embed(long), short.embed(cut))
    of_long, of_cut = (short.sample(asked, [[1]], SAMPLING)[0].samples[0] for asked in (long, cut))
    assert of_long.completion_ids == of_cut.completion_ids


def test_line_breaks_and_end_tokens_stop(engine: TransformersEngine) -> None:
    decoded = {engine.tokenizer.decode([token]) for token in stop_tokens(engine.tokenizer)}
    assert "\n" in decoded
    assert engine.tokenizer.eos_token in decoded
    assert "a" not in decoded


@given(seed=st.integers(0, 2**32), top_p=st.floats(0.05, 1.0), width=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_choose_takes_from_the_nucleus_alone(seed: int, top_p: float, width: int) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(8, width)) * 3)
    uniform = torch.from_numpy(random.random(8))
    chosen = choose(logits, uniform, top_p)
    probabilities = torch.softmax(logits, dim=-1).numpy()
    for row, token in zip(probabilities, chosen.tolist(), strict=True):
        above = row[row > row[token]].sum()
        assert above < top_p + 1e-9


@pytest.mark.parametrize(("top_p", "nucleus"), [(1.0, 4), (0.95, 3), (0.9, 2), (0.6, 1)])
def test_choose_follows_the_distribution_of_the_nucleus(top_p: float, nucleus: int) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, -8.0]])  # probabilities .665, .245, .090, .0001
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))
    counts = torch.bincount(choose(logits.expand(20_000, -1), uniform, top_p), minlength=4) / 20_000
    inside = torch.softmax(logits[0], 0) * (torch.arange(4) < nucleus)
    torch.testing.assert_close(counts, inside / inside.sum(), atol=0.01, rtol=0)


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_the_last_bit_of_a_logit_does_not_change_the_draw(top_p: float) -> None:
    """Tokens of equal probability keep their places in the draw when noise puts the one above the other."""
    logits = torch.zeros(500, 40, dtype=torch.float64)
    logits[:, 20:] = -9.0  # far out of the nucleus
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=logits.shape)) * 1e-9
    uniform = torch.from_numpy(np.random.default_rng(4).random(500))
    assert torch.equal(choose(logits + noise, uniform, top_p), choose(logits, uniform, top_p))


def test_a_flat_distribution_is_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(16, 64)))
    uniform = torch.from_numpy(np.random.default_rng(2).random(16))
    whole = choose(logits, uniform, 0.99)
    monkeypatch.setattr(transformers_engine, "TOP_TOKENS", 4)
    assert torch.equal(choose(logits, uniform, 0.99), whole)


def test_seeds_depend_on_every_part() -> None:
    assert (
        len(
            {
                sample_seed(*parts)
                for parts in [(0, 1, "a", 0), (1, 1, "a", 0), (0, 2, "a", 0), (0, 1, "b", 0), (0, 1, "a", 1)]
            }
        )
        == 5
    )


def test_a_text_of_no_token_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(ConfigError, match=r"^prompt\.template: a text is empty, and so is the suffix"):
        engine.embed(Prompts("What is asked?", ["a refund", ""], ""))


def test_a_model_that_does_not_see_all_of_a_prompt_is_refused(tmp_path: Path) -> None:
    """Padding would stand in its window: what is read of a text would depend on the others of its batch."""
    models.load_tokenizer("tiny").save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = MistralConfig(
        **sizes, vocab_size=len(models.load_tokenizer("tiny")), num_key_value_heads=2, sliding_window=32
    )
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    small = TransformersEngine(config.Reasoner(model=str(tmp_path), dtype="float32"), max_session_tokens=64)
    assert small.embed(prompts(["a refund"], "Ask: ")).shape == (1, 16)
    with pytest.raises(
        ConfigError, match=r"^reasoner\.model: .* looks 32 tokens back, and a prompt has \d+; choose a mod"
    ):
        small.embed(prompts(["a refund", "a parcel of " * 9], "Ask: "))
