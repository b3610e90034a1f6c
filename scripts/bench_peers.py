"""Quantize one model with several tools under the same conditions and compare the results.

    python scripts/bench_peers.py --model DIR --calibration calibration.npy --heldout heldout.npy \
        --bits 4 3 2 --group-size 64 128 --envs DIR --out results.json

The token files are integer arrays (sequences, length). Every tool calibrates on exactly these
tokens, and one evaluator judges every checkpoint, as the tools' own differ by more than methods
do. A peer lives in its own environment under --envs, made on first use, as peers pin versions of
transformers. Each run is its own process, measured whole. stdout: a table; --out: everything.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from math import exp, nan
from pathlib import Path
from typing import Any

import numpy

PER_MB = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # ru_maxrss is in bytes or KiB
SCALE_BITS = 16  # of every group
DAMPING, BLOCK = 0.01, 128  # of GPTQ; GPTQModel's block is fixed, compresso's its own default
# package-method; each package but compresso, which runs in this interpreter, has an environment
# of its own. `compresso-mixed` is GPTQ with the bits of every group chosen for the same size.
TOOLS = ["compresso-rtn", "compresso-gptq", "compresso-mixed"]
TOOLS += ["llmcompressor-rtn", "llmcompressor-gptq", "llmcompressor-awq", "gptqmodel-gptq"]
TOOLS += ["autoround-default", "autoround-best"]
REQUIREMENTS = {
    "llmcompressor": ["llmcompressor==0.14.*"],
    "gptqmodel": ["gptqmodel==7.*", "optimum==2.*"],  # transformers loads GPTQ by way of optimum
    "autoround": ["auto-round==0.16.*", "transformers==5.23.*", "accelerate", "datasets"],
}
REPORTED = ("torch", "transformers", "compressed-tensors", "llmcompressor", "gptqmodel")
REPORTED += ("auto-round",)
AUTOROUND_STEPS = {"default": 200, "best": 1000}  # of its commands auto-round, auto-round-best
HEADER = "tool               bits group grid     ppl      KL   top1     MB quantize    wall RSS MB"


@dataclass(frozen=True)
class Job:
    """One run of one tool; travels to the peer's process as JSON."""

    bits: int
    group_size: int
    symmetric: bool
    tool: str
    checkpoint: str
    model: str
    calibration: str
    heldout: str
    batch_size: int
    threads: int


def quantize_llmcompressor(job: Job) -> Iterator[str]:
    """RTN, GPTQ or AWQ, saved packed; yields the name of each step when it is done."""
    import datasets
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    tokens = numpy.load(job.calibration).astype("int64")
    rows = {"input_ids": tokens.tolist(), "attention_mask": (tokens * 0 + 1).tolist()}
    data: dict[str, Any] = {"dataset": datasets.Dataset.from_dict(rows)}
    data |= {"num_calibration_samples": len(tokens), "shuffle_calibration_samples": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    yield "load"
    weights: dict[str, Any] = {"num_bits": job.bits, "group_size": job.group_size}
    weights |= {"symmetric": job.symmetric, "type": "int", "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    options: dict[str, Any] = {"config_groups": groups, "ignore": ["lm_head"]}
    modifier = QuantizationModifier
    if job.tool.endswith("-gptq"):
        modifier = GPTQModifier
        options |= {"dampening_frac": DAMPING, "block_size": BLOCK, "actorder": "static"}
    elif job.tool.endswith("-awq"):
        from llmcompressor.modifiers.awq import AWQModifier as modifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        # 0.14 pins memory for an accelerator where there is none.
        IntermediatesCache.pin_memory = lambda *_: None
    oneshot(model=model, recipe=[modifier(**options)], batch_size=job.batch_size, **data)
    yield "quantize"
    model.save_pretrained(job.checkpoint, save_compressed=True)
    yield "save"


def quantize_gptqmodel(job: Job) -> Iterator[str]:
    """GPTQ, saved packed; yields the name of each step when it is done."""
    from gptqmodel import GPTQModel, QuantizeConfig

    options = {"bits": job.bits, "group_size": job.group_size, "sym": job.symmetric}
    config = QuantizeConfig(damp_percent=DAMPING, **options)
    rows = numpy.load(job.calibration).tolist()
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model = GPTQModel.load(job.model, config, device="cpu")
    yield "load"
    model.quantize(data, batch_size=job.batch_size)
    yield "quantize"
    model.save(job.checkpoint)
    yield "save"


def quantize_autoround(job: Job) -> Iterator[str]:
    """AutoRound with its own settings but for steps, saved packed; yields as the others do."""
    import torch
    import transformers
    from auto_round import AutoRound

    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    tokens = torch.from_numpy(numpy.load(job.calibration).astype("int64"))
    options: dict[str, Any] = {"bits": job.bits, "group_size": job.group_size}
    options |= {"sym": job.symmetric, "iters": AUTOROUND_STEPS[job.tool.split("-")[1]]}
    options |= {"nsamples": len(tokens), "seqlen": tokens.shape[1], "device_map": "cpu"}
    data = [{"input_ids": row[None]} for row in tokens]
    rounding = AutoRound(model, tokenizer, dataset=data, **options)
    yield "load"
    rounding.quantize()
    yield "quantize"
    rounding.save_quantized(job.checkpoint, format="auto_round")
    yield "save"


def load_dense(checkpoint: str) -> Any:
    """The checkpoint through transformers, weights decoded in their stored dtype, then float32.

    Decoded as its user gets them; float32 after that, so that rounding of activations, which
    differs between kernels, is in nobody's perplexity.
    """
    import torch
    import transformers

    config = json.loads((Path(checkpoint) / "config.json").read_text())
    options: dict[str, Any] = {"dtype": "auto", "device_map": "cpu"}
    groups = config.get("quantization_config", {}).get("config_groups", {})
    if len(groups) == 1:  # of several, `dequantize` takes one for all
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    model(torch.zeros(1, 1, dtype=torch.int64))  # decodes what is decoded at the first forward
    for name, module in list(model.named_modules()):
        if hasattr(module, "dequantize_weight"):  # a linear of GPTQModel
            bias = module.bias is not None
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=bias)
            weights = {"weight": module.dequantize_weight().T}
            linear.load_state_dict(weights | ({"bias": module.bias} if bias else {}))
            model.set_submodule(name, linear)
        elif hasattr(module, "qweight"):  # of AutoRound: what it makes of a unit matrix
            inputs, outputs = module.infeatures, module.outfeatures
            linear = torch.nn.Linear(inputs, outputs, bias=module.bias is not None)
            with torch.no_grad():
                bias = torch.zeros(1) if module.bias is None else module.bias.float()
                unit = torch.eye(inputs, dtype=module.scales.dtype)
                linear.weight.copy_((module(unit).float() - bias).T)
                if module.bias is not None:
                    linear.bias.copy_(bias)
            model.set_submodule(name, linear)
    return torch.nn.Module.float(model).eval()  # transformers refuses once-quantized models its own


def evaluate(job: Job) -> dict[str, Any]:
    """Perplexity of original and quantized model, KL(original || quantized) in nats, agreement.

    Means over all predicted tokens. The original runs again for every checkpoint: stored, its
    distributions take gigabytes, and its perplexity proves that all environments agree.
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax, nll_loss

    models = load_dense(job.model), load_dense(job.checkpoint)
    tokens = torch.from_numpy(numpy.load(job.heldout).astype("int64"))
    totals = torch.zeros(4, dtype=torch.float64)
    with torch.inference_mode():
        for row in tokens:
            logits = [model(row[None]).logits[0, :-1].float() for model in models]
            old, new = (log_softmax(one, dim=-1) for one in logits)
            totals[0] += nll_loss(old, row[1:], reduction="sum")
            totals[1] += nll_loss(new, row[1:], reduction="sum")
            totals[2] += kl_div(new, old, log_target=True, reduction="sum")
            totals[3] += (old.argmax(-1) == new.argmax(-1)).sum()
    dense, nll, kl, top1 = (totals / tokens[:, 1:].numel()).tolist()
    return {"dense_perplexity": exp(dense), "perplexity": exp(nll), "kl": kl, "top1": top1}


def work(action: str, payload: str, answer: str) -> None:
    """What a process of this script does; its answer is a file because peers use stdout."""
    peers = {"llmcompressor": quantize_llmcompressor, "gptqmodel": quantize_gptqmodel}
    peers["autoround"] = quantize_autoround
    job, steps, start = Job(**json.loads(payload)), {}, time.perf_counter()
    for name in peers[action](job) if action in peers else ():
        # seconds since the step before, the first with the imports; peak memory so far
        end, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        steps[name] = {"seconds": end - start, "peak_rss_mb": usage.ru_maxrss / PER_MB}
        start = end
    result: dict[str, Any] = {"steps": steps} if steps else evaluate(job)
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    result["versions"] = {name: installed[name] for name in REPORTED if name in installed}
    Path(answer).write_text(json.dumps(result))


def prepare(name: str, envs: Path) -> str:
    """The python of an environment, created and installed unless a finished one is there.

    torch goes first, at this interpreter's version: a peer alone would pull the newest with CUDA.
    """
    if name not in REQUIREMENTS:
        return sys.executable
    directory = envs / name
    python, marker = str(directory / "bin" / "python"), directory / "bench-requirements.txt"
    torch = "torch==" + importlib.metadata.version("torch").partition("+")[0]
    wanted = " ".join([torch, *REQUIREMENTS[name]])
    if not marker.exists() or marker.read_text() != wanted:
        print(f"installing {wanted} into {directory}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", torch]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        subprocess.run(pip + REQUIREMENTS[name], check=True, stdout=sys.stderr)
        if name == "gptqmodel":  # else it compiles its packer, 1.3 GB, inside the first timed run
            code = "from gptqmodel import extension; extension.load('pack_block_cpu')"
            subprocess.run([python, "-c", code], check=False, stdout=sys.stderr)
        marker.write_text(wanted)
    return python


def measured(command: list[str], folder: Path, threads: int) -> dict[str, Any]:
    """Run a command to its end: wall and processor seconds, peak memory; its output if it fails.

    It runs in `folder` because peers leave log directories where they run. GPTQMODEL_CPU_WORKERS
    is that tool's own default for this many cores, but at least 2: it raises with 1, its own value
    on two cores. Threads spinning at barriers make torch several times slower when others share
    the cores, so they sleep unless the caller says otherwise.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment |= {"GPTQMODEL_CPU_WORKERS": str(min(12, max(2, (threads + 1) // 2)))}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    output, start = folder / "output.txt", time.perf_counter()
    with output.open("wb") as sink:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=sink, stderr=sink)
        # wait4, as getrusage(RUSAGE_CHILDREN) is a maximum over every child so far
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"exit status {process.returncode}:\n{tail}")
    wall, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    times = {"wall_seconds": wall, "cpu_seconds": cpu, "load_average": os.getloadavg()[0]}
    return times | {"peak_rss_mb": usage.ru_maxrss / PER_MB}


def run(job: Job, python: str, folder: Path) -> dict[str, Any]:
    """Quantize, then evaluate, each in a process of its own; everything measured about it."""
    package, method = job.tool.split("-")
    answer, checkpoint = folder / "answer.json", Path(job.checkpoint)
    # -P: the files beside this script must not shadow modules that a peer imports
    worker = [python, "-P", str(Path(__file__).resolve()), "--worker"]
    payload = [json.dumps(asdict(job)), str(answer)]
    if package in REQUIREMENTS:
        result = measured([*worker, package, *payload], folder, job.threads)
        result |= json.loads(answer.read_text())
    else:
        command = [python, "-m", "compresso", "quantize", job.model, "-o", job.checkpoint]
        if method == "mixed":  # what the others store for such bits and groups, spent otherwise
            stored = job.bits + SCALE_BITS / job.group_size
            command += (
                f"--method gptq --target-bits {stored} --group-size {2 * job.group_size}".split()
            )
        else:
            command += f"--method {method} --bits {job.bits}".split()
            command += ["--group-size", str(job.group_size)]
        command += ["--sym" if job.symmetric else "--asym"]
        if method != "rtn":
            sequences, length = numpy.load(job.calibration, mmap_mode="r").shape
            command += ["--dataset", job.calibration]
            command += ["--nsamples", str(sequences), "--seqlen", str(length)]
        result = measured(command, folder, job.threads)
        record = json.loads((checkpoint / "compresso.json").read_text())
        seconds = record.get("seconds", record["report"]["summary"].get("seconds"))
        result["steps"] = {"quantize": {"seconds": seconds}}
    result["config"] = json.loads((checkpoint / "config.json").read_text())
    result["weights_mb"] = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) / 1e6
    result["evaluation"] = measured([*worker, "evaluate", *payload], folder, job.threads)
    return result | json.loads(answer.read_text())


def row(entry: dict[str, Any]) -> str:
    """One line of the table; `quantize` is without imports, loading and saving."""
    grid = "sym" if entry["symmetric"] else "asym"
    line = f"{entry['tool']:19}{entry['bits']:4}{entry['group_size']:6}{grid:>5}"
    if "error" in entry:
        return f"{line} failed: {entry['error'].splitlines()[-1]}"
    line += "{perplexity:8.3f}{kl:8.4f}{top1:7.1%}{weights_mb:7.2f}".format(**entry)
    quantize = entry["steps"]["quantize"]["seconds"] or nan
    return f"{line}{quantize:9.1f}{entry['wall_seconds']:8.1f}{entry['peak_rss_mb']:7.0f}"


def arguments() -> argparse.Namespace:
    """The command line; both symmetries run if both are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--calibration", "--heldout", "--envs", "--out"):
        parser.add_argument(name, type=os.path.abspath, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, nargs="+", default=[64])
    parser.add_argument("--symmetric", dest="grids", action="append_const", const=True)
    parser.add_argument("--asymmetric", dest="grids", action="append_const", const=False)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument(
        "--batch-size", type=int, default=1, help="of the peers; 1 is their default"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> int:
    """Run every combination; one that fails is reported and the others still run."""
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return 0
    args, results = arguments(), []
    pythons = {tool: prepare(tool.split("-")[0], Path(args.envs)) for tool in args.tools}
    common = (args.model, args.calibration, args.heldout, args.batch_size, args.threads)
    print(HEADER)
    for setting in product(args.bits, args.group_size, args.grids or [True], args.tools):
        with tempfile.TemporaryDirectory() as folder:
            job = Job(*setting, os.path.join(folder, "model"), *common)
            try:
                outcome = run(job, pythons[job.tool], Path(folder))
            except (RuntimeError, OSError) as error:
                outcome = {"error": str(error)}
        results.append(asdict(job) | outcome)
        Path(args.out).write_text(json.dumps(results, indent=1))
        print(row(results[-1]), flush=True)
    good = [entry for entry in results if "error" not in entry]
    print("perplexity of the original:", *{f"{entry['dense_perplexity']:.3f}" for entry in good})
    return int(len(good) < len(results))


if __name__ == "__main__":
    sys.exit(main())
