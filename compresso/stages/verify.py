"""Hold what lies on the disk against what its record says of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from compresso.calibration.opening import open_adapter
from compresso.calibration.replay import fingerprint_of
from compresso.checkpoint.checksums import CHECKSUMS, altered
from compresso.checkpoint.hub import place_of
from compresso.checkpoint.proof import TOLERANCE, Fingerprint, prove
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, GateError
from compresso.families import FAMILIES, RESTRUCTURED
from compresso.provenance import RECORD, read_record
from compresso.proving import prove_here, prove_in
from compresso.report import rows_table, summary_table
from compresso.runtime import Runtime, log
from compresso.runtimes.engine import Engine, engines_for, ready_engine
from compresso.stages.contents import by_kind, contents_of, is_checkpoint, shortened

TRANSFORMERS = "transformers"


def verify(name: str, runtimes: list[str], runtime: Runtime) -> dict[str, Any]:
    """Load a model again in runtimes, and say what is stored; plain values.

    name:     a checkpoint, as commands take it, or an export: its directory, or its GGUF file.
    runtimes: names of those to run it in; all that are installed and take it if empty.

    What it says of the recorded tokens must be what it said when it was made, and what it writes
    with a cache what it writes without; and its files must have the recorded checksums, as a
    small change can be lost in rounding. A checkpoint without a record is held against compresso's
    own evaluation of it, block by block.

    A runtime in which it fails has a `failure`, files that are not what they were are under
    `changed` and `gone`. Raises CheckpointError if there is no model, and
    ResourceError if a runtime that was asked for is not installed.
    """
    path = place_of(name)
    folder = path.parent if path.is_file() else path
    engines = _chosen(path, runtimes)
    record = read_record(folder)
    expected, origin = _expected(path, record, runtime)
    found: dict[str, Any] = {
        "path": str(path),
        "expected": origin,
        "tokens": expected.tokens.shape[1],
        "runtimes": [_run(engine, path, record, expected, runtime) for engine in engines],
    }
    files = altered(folder, record[CHECKSUMS]) if CHECKSUMS in record else {}
    return found | files | _contents(path, record)


def print_verification(found: dict[str, Any]) -> None:
    """Write it to stdout, for people."""
    console = Console(highlight=False)
    console.print(rows_table(found["tensors"], "tensors"))
    shown = {k: v for k, v in found.items() if k not in ("tensors", "runtimes", "packed", "kept")}
    for key in ("only_here", "only_in_source"):
        if key in shown:
            shown[key] = shortened(shown[key])
    shown |= {"packed_tensors": len(found["packed"]), "kept_tensors": len(found["kept"])}
    console.print(summary_table(shown, "stored"))
    for entry in found["runtimes"]:
        console.print(summary_table(entry, f"in {entry['runtime']}"))


def check_verification(found: dict[str, Any]) -> None:
    """Raises GateError if a runtime has a failure, or a file is another: it names the first."""
    failed = [
        f"in {entry['runtime']}: {entry['failure']}"
        for entry in found["runtimes"]
        if "failure" in entry
    ]
    words = {"changed": "has changed since it was made", "gone": "is gone"}
    failed += [f"`{name}` {word}" for key, word in words.items() for name in found.get(key, ())]
    if failed:
        rest = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise GateError(failed[0] + rest)


def _chosen(path: Path, runtimes: list[str]) -> list[Engine]:
    if runtimes:
        engines = [ready_engine(name) for name in dict.fromkeys(runtimes)]
        for engine in engines:
            if not engine.accepts(path):
                others = [f"`{other.NAME}`" for other in engines_for(path)]
                raise CheckpointError(
                    f"`{path}` is nothing that runtime `{engine.NAME}` loads",
                    hint=f"it is for {', '.join(others)}" if others else "export it for that",
                )
        return engines
    engines = engines_for(path)
    if not engines:
        raise CheckpointError(f"`{path}` is nothing that a runtime here loads")
    ready = [engine for engine in engines if engine.missing() is None]
    for engine in engines:
        if (missing := engine.missing()) is not None:
            log(f"not verified in {engine.NAME}, which needs {missing}")
    return ready or [ready_engine(engines[0].NAME)]


def _expected(path: Path, record: dict[str, Any], runtime: Runtime) -> tuple[Fingerprint, str]:
    """What the model should say, and who says so."""
    if (values := record.get("fingerprint")) is not None:
        expected = Fingerprint.from_json(values)
        return _computed_in(expected, runtime.dtype), f"the fingerprint in `{RECORD}`"
    if path.is_file():
        raise CheckpointError(
            f"there is no fingerprint beside `{path}` to hold it against",
            hint=f"`compresso export` writes one to `{RECORD}`; leave the file where that is",
        )
    source = Checkpoint(path)
    kind = source.config["model_type"]
    if kind.removeprefix(RESTRUCTURED) not in FAMILIES:
        raise CheckpointError(
            f"`{path}` has no `{RECORD}` to hold it against, and compresso cannot run a `{kind}`"
        )
    return fingerprint_of(source, runtime), "compresso's own evaluation, block by block"


def _computed_in(expected: Fingerprint, dtype: torch.dtype | None) -> Fingerprint:
    """The same, to be compared with a model that runs in another type."""
    if dtype is None or dtype == expected.dtype:
        return expected
    limits = [TOLERANCE[one] for one in (dtype, expected.dtype) if one is not None]
    return replace(expected, dtype=dtype, tolerance=max(*limits, expected.tolerance or 0.0, 0.0))


def _run(
    engine: Engine, path: Path, record: dict[str, Any], expected: Fingerprint, runtime: Runtime
) -> dict[str, Any]:
    """What a runtime made of it, or how it failed."""
    entry: dict[str, Any] = {"runtime": engine.NAME, "version": engine.version()}
    trust = runtime.trust_remote_code
    log(f"loading `{path}` in {engine.NAME}")
    try:
        if engine.NAME == TRANSFORMERS:
            proof = _prove(path, record, expected, runtime)
        else:
            proof = prove_in(engine, path, expected, trust_remote_code=trust)
    except GateError as error:
        return entry | {"loads_and_equals": False, "failure": str(error)}
    values = {name: value for name, value in asdict(proof).items() if value is not None}
    return entry | {"loads_and_equals": True, **values}


def _prove(path: Path, record: dict[str, Any], expected: Fingerprint, runtime: Runtime) -> Any:
    """In transformers: as every stage does, or for what compresso cannot read, plainly."""
    written = Checkpoint(path)
    carried = record.get("carried")
    try:
        readable = bool(written.weight_names())
    except CheckpointError:
        readable = False
    if not readable:
        return prove(
            path,
            expected,
            dtype=expected.dtype or written.dtype,
            device=runtime.device,
            trust_remote_code=runtime.trust_remote_code,
            carried=carried or (),
            tolerance=expected.tolerance,
        )
    if carried is None:
        carried = open_adapter(written, runtime).unmapped_tensors()
    return prove_here(written, expected, runtime, carried=carried)


def _contents(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The tensors, by how they are stored, and how they differ from the source's."""
    stored = contents_of(path)
    found: dict[str, Any] = {
        "tensors": by_kind(stored),
        "packed": [tensor.name for tensor in stored if tensor.packed],
        "kept": [tensor.name for tensor in stored if not tensor.packed],
        "bytes": sum(tensor.nbytes for tensor in stored),
    }
    if not record:
        return found
    source = Path(record["source"]["path"])
    try:
        before = contents_of(source) if source.is_dir() else []
    except CheckpointError as error:
        return found | {"source": f"{error}"}
    if not before:
        return found | {"source": f"`{source}` is gone"}
    found |= {"source": str(source), "bytes_of_source": sum(one.nbytes for one in before)}
    if is_checkpoint(path):  # other formats have other names
        ours, theirs = ({one.name for one in side} for side in (stored, before))
        found |= {"only_here": sorted(ours - theirs), "only_in_source": sorted(theirs - ours)}
    return found
