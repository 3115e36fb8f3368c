"""N samples of each prompt: ours beside transformers' `generate(num_return_sequences=N)` and, where there is one, vLLM.

    python -m benchmarks.n_sampling --out runs/sampling
    python -m benchmarks.n_sampling --out runs/sampling --vllm-python .venv-vllm/bin/python

    generate  transformers, float32: every prompt is prefilled N times over, and its cache held N times
    float32   ours in the same precision: the implementation alone
    ours      ours in the precision that this machine is given by `reasoner.dtype: auto`
    vllm      vLLM's own `LLM.generate` with n=N in the same precision, prompts in one call, prefix caching on
    compiled  the same with `reasoner.vllm.compiled`; it needs a compiler

All write the same number of tokens, whatever they say. Prompts are different from their first token on. Ours gives
log-probabilities and the embeddings e(x) and e(x,q) as well; the others tokens alone. The same command goes on where it
stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, progress, storage
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine

LENGTHS = (100, 512, 1024)
TEXT = "order waits in To Receive, 7 days; opened the tracking page; typed where is my parcel; "
SAMPLING = {"temperature": 0.8, "top_p": 0.95}
TABLE_WIDTH = 100
CONTENDERS = ("generate", "float32", "ours", "vllm", "compiled")
VLLM = ("vllm", "compiled")


def measure(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt; repeatable.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that are sampled together.")] = 4,
    n: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 8,
    new: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 32,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    model: Annotated[str, typer.Option(help="As reasoner.model.")] = "smollm2",
    vllm_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment with vLLM.")] = None,
) -> None:
    """Measure every contender at every length, each in a process of its own, and print ratios."""
    out.mkdir(parents=True, exist_ok=True)
    lengths = length or LENGTHS
    contenders = [name for name in CONTENDERS if name not in VLLM or vllm_python]
    dtype = models.settle(config.Reasoner(model=model)).dtype
    found = []
    with progress.track("sampling", len(lengths) * len(contenders), "measurements") as advance:
        for tokens in lengths:
            for name in contenders:
                python = str(vllm_python) if name in VLLM else sys.executable
                precision = dtype if name in ("ours", *VLLM) else "float32"
                task = (name, precision, model, tokens, prompts, n, new, repetitions, threads)
                result = out / "measured" / f"{'-'.join(str(word).replace('/', '_') for word in task)}.json"
                if not result.exists():
                    told = command.apart([python, "-m", "benchmarks.n_sampling", "one", *task], threads=threads)
                    storage.write_bytes(str(result), told.splitlines()[-1].encode())
                measured = json.loads(result.read_text())
                found.append({"contender": name, "length": tokens, "dtype": precision} | measured)
                advance(1)
    (out / "n_sampling.json").write_text(
        json.dumps({"n": n, "new": new, "prompts": prompts, "measured": found}, indent=2)
    )
    _show(found, n, new)
    print(out / "n_sampling.json")


def one(name: str, dtype: str, model: str, *sizes: str) -> None:
    """One contender at one length, in this process: seconds of each repetition, the first call left out."""
    length, prompts, n, new, repetitions, threads = map(int, sizes)
    texts = [f"{place} {TEXT * (length // 8)}" for place in range(prompts)]
    chosen = {"model": model, "dtype": dtype, "device": "cpu", "threads": threads}
    settings = config.Reasoner.model_validate(chosen | {"vllm": {"compiled": name == "compiled"}})
    start = {"generate": _generate, "vllm": _vllm, "compiled": _vllm}.get(name, _ours)
    call = start(settings, texts, length, n, new)
    call(0)
    walls, cpus = [], []
    for repetition in range(1, repetitions + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        made = call(repetition)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        assert made == prompts * n * new, f"{made} tokens"
    print(json.dumps({"tokens": prompts * n * new, "wall_s": walls, "cpu_s": cpus}))


Call = Callable[[int], int]
"""A repetition's number, so that nothing is answered from memory → tokens that were written."""


def _ours(settings: config.Reasoner, texts: list[str], length: int, n: int, new: int) -> Call:
    engine = TransformersEngine(settings, length)
    engine.stop_ids = set()

    def call(repetition: int) -> int:
        seeds = [[(repetition * len(texts) + row) * n + place for place in range(n)] for row in range(len(texts))]
        groups = engine.sample(Prompts("", texts, ""), seeds, config.Sampling(**SAMPLING, max_new_tokens=new))
        return sum(len(sample.completion_ids) for group in groups for sample in group.samples)

    return call


def _generate(settings: config.Reasoner, texts: list[str], length: int, n: int, new: int) -> Call:
    torch.set_num_threads(settings.threads)
    model = models.load_base(settings)
    ids = _prompts(settings, texts, length)

    def call(repetition: int) -> int:
        torch.manual_seed(repetition)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                **SAMPLING,
                num_return_sequences=n,
                min_new_tokens=new,
                max_new_tokens=new,
            )
        return made[:, ids.shape[1] :].numel()

    return call


def _vllm(settings: config.Reasoner, texts: list[str], length: int, n: int, new: int) -> Call:
    from vllm import SamplingParams

    from rgalign_ray.reasoner import vllm_engine

    llm = vllm_engine._start(settings)
    prompts = [{"prompt_token_ids": row} for row in _prompts(settings, texts, length).tolist()]

    def call(repetition: int) -> int:
        llm.reset_prefix_cache()
        sampling = SamplingParams(**SAMPLING, n=n, max_tokens=new, ignore_eos=True, detokenize=False, seed=repetition)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    return call


def _prompts(settings: config.Reasoner, texts: list[str], length: int) -> torch.Tensor:
    tokenizer = models.load_tokenizer(settings.model)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts])


def ratios(found: list[dict[str, Any]], seconds: str) -> dict[tuple[int, str], float]:
    """How many times as fast as `generate` each contender is, by its median."""
    median = {(one["length"], one["contender"]): statistics.median(one[seconds]) for one in found}
    return {(length, name): median[length, "generate"] / value for (length, name), value in median.items()}


def _show(found: list[dict[str, Any]], n: int, new: int) -> None:
    table = Table(title=f"N = {n} samples of {new} tokens a prompt")
    for head in ("prompt", "contender", "dtype"):
        table.add_column(head)
    for head in ("tokens/s", "/s of CPU", "× generate", "× by CPU", "seconds"):
        table.add_column(head, justify="right")
    wall, cpu = ratios(found, "wall_s"), ratios(found, "cpu_s")
    for row in found:
        place = row["length"], row["contender"]
        table.add_row(
            f"{row['length']:,}",
            row["contender"],
            row["dtype"],
            f"{row['tokens'] / statistics.median(row['wall_s']):,.0f}",
            f"{row['tokens'] / statistics.median(row['cpu_s']):,.0f}",
            f"{wall[place]:.1f}",
            f"{cpu[place]:.1f}",
            f"{min(row['wall_s']):.1f} … {max(row['wall_s']):.1f}",
        )
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


if __name__ == "__main__":
    command.run(measure, one)
