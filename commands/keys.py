"""Commands of keys: rotate, seal, lock, who may ask, what was done."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RunError
from ..names import Verb
from . import ProjectFolder, RunFolder, app, keys_of, load, run_folder


@app.command("rotate-keys")
def rotate_keys(
    folder: ProjectFolder,
    run: RunFolder = None,
    retire: Annotated[
        bool, typer.Option("--retire", help="Then remove the older keys. Other runs that share the store would lose theirs.")
    ] = False,
    requests: Annotated[
        bool, typer.Option("--requests", help="Make a new key for sealed requests instead; endpoints that run take it up.")
    ] = False,
) -> None:
    """Make a new key, and wrap the data keys of a run's shards with it: no data is written again.

    Example:  heliograph rotate-keys examples/digits --retire
              heliograph rotate-keys examples/digits --requests
    """
    loaded = load(folder)
    from ..jobs.run import rotate_keys as rotate
    from ..jobs.run import rotate_request_key

    held = run_folder(folder, run)
    if not held.is_dir():
        raise RunError(f"{held}: no such run: run `heliograph run {folder}` first")
    typer.echo((rotate_request_key if requests else rotate)(loaded, folder.resolve(), held, retire))


@app.command()
def seal(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Put a finished run away: its folder becomes one sealed file (AES-256-GCM), its key store stays.

    Example:  heliograph seal examples/digits; heliograph unseal examples/digits
    """
    from ..jobs.archive import seal as put_away

    typer.echo(put_away(run_folder(folder, run), keys_of(folder, run), _progress))


@app.command()
def unseal(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Take a run that was put away by `heliograph seal` out again.

    Example:  heliograph unseal examples/digits
    """
    from ..jobs.archive import unseal as take_out

    typer.echo(take_out(run_folder(folder, run), keys_of(folder, run), _progress))


@contextlib.contextmanager
def _progress(what: str, total: int) -> Any:
    """A bar of bytes on a terminal; yields what takes how many more are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(TextColumn(what), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@app.command("guard-keys")
def guard_keys(
    folder: ProjectFolder,
    run: RunFolder = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="By a passphrase, in the file that HELIOGRAPH_PASSPHRASE_FILE names.")
    ] = False,
    kms: Annotated[str | None, typer.Option(help="By this key of AWS KMS: its id, ARN or alias/NAME.")] = None,
    none: Annotated[bool, typer.Option("--none", help="By the system's permissions alone, as in the beginning.")] = False,
) -> None:
    """Lock the files of the key store by more than the system's permissions. Whoever uses a key then needs that too.

    Example:  HELIOGRAPH_PASSPHRASE_FILE=/run/secrets/passphrase heliograph guard-keys . --passphrase
              heliograph guard-keys . --kms alias/heliograph
    """
    import secrets

    from ..cluster.audit import Audit
    from ..errors import KeyStoreError

    if sum((passphrase, kms is not None, none)) != 1:
        raise KeyStoreError("guard-keys: name one of --passphrase, --kms KEY, --none")
    keys = keys_of(folder, run)
    by = {"by": "kms", "key": kms} if kms else {"by": "passphrase", "salt": secrets.token_hex(16)} if passphrase else None
    count = keys.guard_by(by)
    Audit(keys).write("guard", by["by"] if by else "none")
    typer.echo(
        f"{keys.folder}: {count} keys are locked by {f'AWS KMS ({kms})' if kms else 'a passphrase' if by else 'permissions'}"
    )


tokens = typer.Typer(no_args_is_help=True, help="Who may ask an endpoint whose `serve.access` is `tokens`.")
app.add_typer(tokens, name="token")


@tokens.command("add")
def token_add(
    folder: ProjectFolder,
    name: Annotated[str, typer.Option(help="Whose it is.")],
    model: Annotated[list[str] | None, typer.Option(help="A model that it is for; again for more (default: all).")] = None,
    verb: Annotated[list[Verb] | None, typer.Option(help="Of what; again for more (default: predict, read).")] = None,
    days: Annotated[float | None, typer.Option(help="How long it is good for (default: until it is revoked).", min=0.001)] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, of each replica (default: any).", min=0.001)] = None,
    run: RunFolder = None,
) -> None:
    """Make a token and print it: this once, for only its hash is kept. Endpoints that run take it at once.

    Example:  export HELIOGRAPH_TOKEN=$(heliograph token add . --name alice --days 30)
    """
    made = _tokens(folder, run).add(name, model or [], verb or [Verb.PREDICT, Verb.READ], days, rate)
    typer.echo(made)


@tokens.command("list")
def token_list(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Show the tokens there are, a JSON object a line; the tokens themselves are nowhere.

    Example:  heliograph token list examples/digits
    """
    for token in _tokens(folder, run).all():
        typer.echo(token.model_dump_json(exclude={"sha256"}))


@tokens.command("revoke")
def token_revoke(
    folder: ProjectFolder,
    identity: Annotated[str, typer.Argument(help="Its id: what stands between the `_` of hg_ID_…")],
    run: RunFolder = None,
) -> None:
    """Remove a token: the next request with it is refused.

    Example:  heliograph token revoke examples/digits 3f9c2a1b
    """
    typer.echo(f"revoked: {_tokens(folder, run).revoke(identity).name}'s token {identity}")


def _tokens(folder: Path, run: str | None) -> Any:
    from ..serve.access import Tokens

    return Tokens(keys_of(folder, run))


@app.command("node-certificate")
def node_certificate(
    folder: ProjectFolder,
    address: Annotated[str, typer.Argument(help="The node's IP address or host name.")],
    run: RunFolder = None,
) -> None:
    """Make the certificate that a node of a Ray cluster shows to the others, and print what Ray on it needs (mutual TLS).

    The authority that signs is made once, in the key store; a process without a certificate of it talks to no node.

    Example:  heliograph node-certificate . 10.0.0.7 > node.env
    """
    from ..cluster.tls import node_certificate as certificate

    for name, value in certificate(keys_of(folder, run), address).items():
        typer.echo(f"{name}={value}")


@app.command("verify-audit")
def verify_audit(
    folder: ProjectFolder,
    run: RunFolder = None,
    count: Annotated[int, typer.Option(help="Lines that were noted before: the log must still begin with them.", min=0)] = 0,
    mac: Annotated[str, typer.Option(help="The last one's mac that was noted with them.")] = "",
) -> None:
    """Check that nobody changed the audit log: who deployed, served, rotated keys, made and revoked tokens, was refused.

    Note what it prints somewhere else: with it, a log that was cut or written anew is found out too.

    Example:  heliograph verify-audit . --count 12 --mac 5c0f…
    """
    from ..cluster.audit import Audit

    audit = Audit(keys_of(folder, run))
    lines, last = audit.verify(count, mac)
    typer.echo(f"{audit.file}: {lines} lines, none changed" + (f"; to note: --count {lines} --mac {last}" if lines else ""))
