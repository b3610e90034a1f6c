"""The command `compresso push`. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compresso.card import CARD
from compresso.report import show_rows
from compresso.runtime import format_bytes, log

PANEL = "Upload"


Output = Annotated[Path, typer.Argument(metavar="MODEL", help="An output of a stage.")]
Repository = Annotated[
    str, typer.Argument(metavar="REPOSITORY", help="Where to: `owner/name` on the hub.")
]
Private = Annotated[
    bool, typer.Option(help="Let nobody else see a repository that is made.", rich_help_panel=PANEL)
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, made if there is none.", rich_help_panel=PANEL)
]
Message = Annotated[str, typer.Option("--message", help="Of the commit.", rich_help_panel=PANEL)]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The model on the hub that it was made from, for the card.",
        show_default="what compresso downloaded, or the original's card names",
        rich_help_panel="Card",
    ),
]
Evaluation = Annotated[
    Path | None,
    typer.Option(
        help="Output of `compresso eval` on it, for the card.",
        show_default="the newest beside it",
        rich_help_panel="Card",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would go, and the card; upload nothing.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def push_command(
    *,
    model: Output,
    repository: Repository,
    private: Private = True,
    revision: Revision = None,
    message: Message = "Upload with compresso",
    base: Base = None,
    evaluation: Evaluation = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Upload MODEL to the Hugging Face Hub, with a model card. `hf auth login` comes before.

    Paths of this machine are left out of the records that go.
    """
    from compresso.push import make_upload, push

    upload = make_upload(model, repository, base=base, evaluation=evaluation)
    sizes = upload.sizes()
    if dry_run:
        card = upload.changed[CARD].decode()
        if as_json:
            found = {"repository": repository, "private": private, "files": sizes, "card": card}
            typer.echo(json.dumps(found, indent=1))
            return
        rows = [{"file": name, "size": format_bytes(size)} for name, size in sizes.items()]
        show_rows(rows, f"would go to {repository}: {format_bytes(sum(sizes.values()))}")
        typer.echo(f"\n{CARD}:\n\n{card}")
        return
    log(f"uploading {len(sizes)} files, {format_bytes(sum(sizes.values()))}, to `{repository}`")
    address = push(upload, private=private, revision=revision, message=message)
    if as_json:
        typer.echo(json.dumps({"repository": repository, "address": address, "files": sizes}))
    else:
        typer.echo(address)
