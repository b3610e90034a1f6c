"""Complete what an export wrote, and prove it in the runtime that it is for."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch

from compresso.beside import side_files
from compresso.calibration.replay import distance, fingerprint_of, replay
from compresso.checkpoint.adapter_folder import AdapterFolder, write_adapter
from compresso.checkpoint.decilm_config import as_our_own
from compresso.checkpoint.directory import ADAPTER
from compresso.checkpoint.proof import TOLERANCE, ProofReport, compare, prove
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.families import FAMILIES, RESTRUCTURED
from compresso.formats.checking import check_weights
from compresso.formats.writing import Written
from compresso.proving import not_proved, prove_in
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime
from compresso.runtimes.engine import engine

TRANSFORMERS = "transformers"
PEFT = {"peft": "'compresso-llm[peft]'"}


def finish_export(
    source: Checkpoint, step: Step, report: Report, writer: CheckpointWriter, runtime: Runtime
) -> dict[str, Any]:
    """Add everything but the record to what a format wrote, and prove that.

    Returns what the record has to say of it. Raises GateError if the proof fails.
    """
    written = report.written
    assert written is not None and report.fingerprint is not None
    if written.config is None:
        files = {}
    else:
        files = side_files(source, written.config) | written.files
        writer.finalize(config=written.config, side_files=files, expected=written.expected)
        if written.exported is not None and runtime.verify:
            check_weights(
                written.exported,
                Checkpoint(writer.partial),
                rounded=written.rounded,
                carried=written.carried,
            )
    record: dict[str, Any] = {}
    if written.adapter:
        record[ADAPTER] = _put_adapter(source, written, writer)
    if written.reread:
        own = fingerprint_of(Checkpoint(writer.partial), runtime)
        report.summary |= distance(report.fingerprint, own)
        report.fingerprint = own
    dtype = report.fingerprint.dtype or runtime.compute_dtype(source.dtype)
    report.fingerprint = replace(
        report.fingerprint.up_to(written.longest), dtype=dtype, tolerance=written.tolerance
    )
    record |= {"fingerprint": report.fingerprint.to_json(), "carried": written.carried}
    found = _prove(source, step, report, writer, runtime)
    return record | ({} if found is None else {"proof": found})


def _put_adapter(source: Checkpoint, written: Written, writer: CheckpointWriter) -> str:
    """Put corrections beside the weights; the key of the adapter."""
    dtype = source.dtype
    for factor in written.adapter.values():
        for values in (factor.up, factor.down):
            if not torch.equal(values.to(dtype).float(), values.float()):
                dtype = torch.float32
    write_adapter(
        writer.partial,
        written.adapter,
        modules={module: module for module in written.adapter},
        base=writer.target,
        dtype=dtype,
        fan_in_fan_out=written.fan_in_fan_out,
    )
    return AdapterFolder(writer.partial / ADAPTER, {}, {}, {}, {}).key


def _prove(
    source: Checkpoint, step: Step, report: Report, writer: CheckpointWriter, runtime: Runtime
) -> dict[str, Any] | None:
    """What the proof found; None, and a warning that says why, if there could be none."""
    written = report.written
    assert written is not None and report.fingerprint is not None
    report.summary["proved"] = "no"
    if not runtime.verify:
        report.warnings.append(not_proved(writer.target))
        return None
    if reason := _unprovable(source, written, report, runtime):
        report.warnings.append(
            f"not proved: the {step.method} export was written, but not loaded in"
            f" `{written.runtime}`, as {reason}"
        )
        return None
    if written.runtime == TRANSFORMERS and not _fits(source, report, runtime):
        found, proved_in = _prove_in_blocks(report, writer, runtime), "compresso, block by block"
    elif written.runtime == TRANSFORMERS:
        found = prove(
            writer.partial,
            report.fingerprint,
            dtype=runtime.compute_dtype(source.dtype),
            device=runtime.device,
            trust_remote_code=runtime.trust_remote_code or written.shipped,
            carried=written.carried,
            tolerance=written.tolerance,
        )
        proved_in = f"{TRANSFORMERS} {version(TRANSFORMERS)}"
    else:
        ours = engine(written.runtime)
        found = prove_in(ours, writer.partial, report.fingerprint)
        proved_in = f"{ours.NAME} {ours.version()}"
    report.summary["proved"] = f"in {proved_in}"
    report.summary["difference"] = found.difference
    report.summary["same_top_token"] = found.top_agreement
    return {"runtime": proved_in, **asdict(found)}


def _unprovable(
    source: Checkpoint, written: Written, report: Report, runtime: Runtime
) -> str | None:
    """Why the result cannot be loaded here; None if it can."""
    if written.runtime != TRANSFORMERS:
        missing = engine(written.runtime).missing()
        what, _, install = (missing or "").partition(": ")
        return f"{what} is not installed: {install}" if missing else None
    for package, install in (written.packages | (PEFT if written.adapter else {})).items():
        if importlib.util.find_spec(package) is None:
            return f"package `{package.replace('_', '-')}` is not installed: pip install {install}"
    model_type = as_our_own(written.config or {}).get("model_type", "")
    readable = model_type.removeprefix(RESTRUCTURED) in FAMILIES
    if not readable and not _fits(source, report, runtime):
        return "it is larger than `--max-memory`"
    return None


def _fits(source: Checkpoint, report: Report, runtime: Runtime) -> bool:
    """Whether the whole model may be in memory."""
    weights = sum(row["weights"] for row in report.rows)
    dtype = runtime.compute_dtype(source.dtype)
    held: int = weights * max(dtype.itemsize, source.dtype.itemsize)
    return held <= runtime.max_memory


def _prove_in_blocks(report: Report, writer: CheckpointWriter, runtime: Runtime) -> ProofReport:
    """The same for a model that does not fit the memory budget: compresso reads what was written.

    It cannot generate so, and that others load it is not proved.
    """
    assert report.fingerprint is not None and report.written is not None
    written, tokens = Checkpoint(writer.partial), report.fingerprint.tokens
    dtype = runtime.compute_dtype(written.dtype)
    logits = replay(
        written,
        tokens,
        dtype=dtype,
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
    report.warnings.append(
        "proved block by block, without loading it whole, as it is larger than `--max-memory`"
    )
    tolerance = report.written.tolerance or TOLERANCE[dtype]
    return compare(writer.partial, logits, report.fingerprint, tolerance)
