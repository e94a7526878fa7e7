"""`lungwatch model keygen` and `sign`: who answers for a bundle."""

from pathlib import Path

import click

from lungwatch.cli.options import json_option
from lungwatch.cli.output import cell_text, print_json

_passphrase_option = click.option(
    "--passphrase-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the private key's passphrase, readable by its owner alone.",
)


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@_passphrase_option
@json_option
def keygen(out: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Make a key pair: the private key OUT, the public key OUT.pub (Ed25519, PEM).

    The private key signs bundles and stays with who answers for them. The public key goes to
    the servers, whose configuration names it: trusted_keys = "PATH". Nothing is overwritten.
    """
    from lungwatch.signing import write_key_pair

    public = out.with_name(out.name + ".pub")
    key = write_key_pair(out, public, _passphrase(passphrase_file))
    if as_json:
        print_json({"private_key": out, "public_key": public, "fingerprint": key})
    else:
        click.echo(f"{out}: private key, keep it to yourself\n{public}: public key {key}")


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--key",
    "key_file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The private key, as `lungwatch model keygen` writes it.",
)
@_passphrase_option
@json_option
def sign(bundle: Path, key_file: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Sign the bundle in the folder BUNDLE: its bundle.sig covers model, contract and card.

    The digests and the golden picture are checked first. An earlier signature is replaced.
    """
    from lungwatch.atomicfile import write_atomic
    from lungwatch.bundle import SIGNATURE_FILE, read_bundle
    from lungwatch.daemon.model import Classifier
    from lungwatch.errors import ModelError
    from lungwatch.signing import load_private_key
    from lungwatch.signing import sign as sign_statement

    key = load_private_key(key_file, _passphrase(passphrase_file))
    files = read_bundle(bundle)
    contract = Classifier.of(files).contract
    if not contract.id == files.id == bundle.absolute().name:
        raise ModelError(
            f"{bundle}: the folder, bundle.json ('{files.id}') and the model ('{contract.id}') "
            "must bear one name"
        )
    signature = sign_statement(files.statement(), key)
    try:
        write_atomic(bundle / SIGNATURE_FILE, signature.to_bytes())
    except OSError as error:
        raise ModelError(
            f"{bundle / SIGNATURE_FILE} cannot be written: {error.strerror}"
        ) from error
    if as_json:
        print_json({"model": contract.id, "path": bundle, "signer": signature.fingerprint})
    else:
        click.echo(f"{cell_text(contract.id)}: signed by {signature.fingerprint}")


def _passphrase(file: Path | None) -> bytes | None:
    from lungwatch.errors import ConfigError
    from lungwatch.signing import read_secret

    if file is None:
        return None
    passphrase = read_secret(file).rstrip(b"\r\n")
    if not passphrase:
        raise ConfigError(f"{file} holds no passphrase")
    return passphrase
