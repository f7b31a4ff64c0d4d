"""The bundle: one signed folder that a model travels in.

    bundle.json      name, format, where it came from, and what it had to reach and did not
    schema.json      what a request must look like
    preprocess.json  the fitted preprocessing
    README.md        the model card
    metrics.json     of the test split
    validation.json  what it had to reach, and what was measured
    reference.json, guard.npz   what training rows are like, without one of them (`guard`)
    explain.json     where the project has `explain`
    model.keras      weights and architecture
    model.onnx       … as ONNX Runtime runs it
    model.tflite     … as LiteRT runs it, where the model converts
    compressed.*     a smaller or faster form, where the project has `compress`, and compress.json: how it was chosen
    model.sig        OpenSSF Model Signing over all of the above (EC P-256)
    key.wrapped      where the project says `train.encrypt`: all of the above but bundle.json are sealed (`cluster.sealed`)

Nothing of a bundle is parsed before its signature has been checked against a key that the reader already trusts; a byte
more, less or other, in any file, and it is refused.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..cluster.keys import KeyStore
from ..cluster.sealed import KEY_FILE, Seal, copy
from ..cluster.storage import in_memory, read_json, write_json
from ..errors import BundleError, SignatureError

SIGNATURE = "model.sig"
FORMAT = 1


def make(folder: Path, name: str, lineage: dict[str, Any], parts: list[Path], keys: KeyStore, failed: Sequence[str] = ()) -> None:
    """Copy `parts` into `folder`, describe and sign them. Where some of them are sealed, all are, with the same key.

    failed: what it had to reach and did not (`evaluate.require`)."""
    from model_signing import signing

    sealed = next((part.parent for part in parts if (part.parent / KEY_FILE).exists()), None)
    if sealed:
        shutil.copyfile(sealed / KEY_FILE, folder / KEY_FILE)
    seal = Seal.of(folder, keys)
    for part in parts:
        if part.parent == sealed:
            shutil.copyfile(part, folder / part.name)
        else:
            copy(part, folder / part.name, keys, seal)
    note = {"format": FORMAT, "name": name, "heliograph": __version__, "lineage": lineage, "failed": list(failed)}
    write_json(folder / "bundle.json", note)
    with in_memory(keys.signing_key(), "signing.key") as private:
        config = signing.Config().use_elliptic_key_signer(private_key=private)
        config.set_hashing_config(_all_but_signature(folder)).sign(folder, folder / SIGNATURE)


def verify(folder: Path, public_key: Path) -> dict[str, Any]:
    """Check a bundle's signature and return what `bundle.json` says.

    Raises BundleError when it is not a bundle, SignatureError when it was changed or signed by another key.
    """
    from model_signing import verifying

    if not (folder / SIGNATURE).is_file() or not (folder / "bundle.json").is_file():
        raise BundleError(f"{folder}: is not a bundle: it lacks {SIGNATURE} or bundle.json")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_all_but_signature(folder)).verify(folder, folder / SIGNATURE)
    except Exception as error:
        raise SignatureError(f"{folder}: its signature does not hold against {public_key}: {_why(error)}") from None
    note = read_json(folder / "bundle.json")
    if note.get("format") != FORMAT:
        raise BundleError(f"{folder}: has format {note.get('format')}, this heliograph reads {FORMAT}")
    return note


def _all_but_signature(folder: Path) -> Any:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE, folder / KEY_FILE], ignore_git_paths=False)


def _why(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"it was changed, or another key signed it ({text[:160]}); do not use it"
