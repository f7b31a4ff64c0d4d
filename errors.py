"""Every error that a user can meet, in one tree.

    HeliographError                 one line: what was found, where, what to do
    ├── ProjectError                heliograph.yaml says something that cannot be
    ├── DataError                   the source, a column or a split is not usable
    ├── ModelError                  the user's model.py does not import, build or fit the schema
    ├── KeyStoreError               a key is missing, damaged or open to others
    ├── AccessError                 somebody may not do what he asked for
    ├── AuditError                  the audit log was changed
    ├── SealError                   a sealed file was changed, cut, or put in another's place
    ├── BundleError                 a bundle is incomplete or of another format
    │   └── SignatureError          … or was changed, or signed by somebody else
    ├── RegistryError               a model or version that the registry does not have
    │   └── RolledBack              … or that did not prove itself in production
    ├── StorageError                object storage cannot be reached, or refuses
    ├── RunError                    the run's folder is in use or holds something else
    ├── ClusterError                a cluster cannot be started, reached or asked for what it was
    ├── EndpointError               the endpoint cannot be started or reached
    │   └── PortInUse
    └── RequestError                one request was refused (``status`` is its HTTP status)
        ├── Overloaded              … because more is asked for than can be answered in time
        └── CapsuleError            an encapsulated request or answer cannot be opened

The command line prints ``str(error)`` and exits with 2. Everything outside this tree is a bug of ours: it exits with 1
and leaves its traceback in the run's ``run.log``. Each class takes one message, so that it survives pickling on its way
out of a Ray worker.
"""


class HeliographError(Exception):
    """The root: catching it catches every mistake that heliograph explains."""


class ProjectError(HeliographError):
    """`heliograph.yaml` says something that cannot be; a line each, where there are several problems. Mend the line that the
    message names; `heliograph check` tries it without starting anything."""


class DataError(HeliographError):
    """The source, a column or a split is not usable. The message names the file and the column; `heliograph check` shows what a
    source holds."""


class ModelError(HeliographError):
    """The project's model does not import, build or fit the schema. The message names the file and the line of `model.py`."""


class KeyStoreError(HeliographError):
    """A key is missing, damaged or open to others. Keys lie in RUN/keys: fetch them from where the run was made, or
    `chmod 600` them; what was sealed with a lost key stays closed."""


class AccessError(HeliographError):
    """A token does not allow what was asked for. Its owner can see what it is for; whoever runs the endpoint makes another one
    with `heliograph token add`."""


class AuditError(HeliographError):
    """The audit log was changed behind heliograph's back. Keep it, and compare it with a copy from elsewhere."""


class SealError(HeliographError):
    """A sealed file was changed, cut, or put in another's place. Fetch it again from where it was made."""


class BundleError(HeliographError):
    """A bundle is incomplete, or cannot answer. Run the project again, or copy the whole folder."""


class SignatureError(BundleError):
    """A bundle was changed after it was signed, or somebody else signed it. Do not serve it; name the signer's own key."""


class RegistryError(HeliographError):
    """The registry does not have such a model or version, or may not give it out. `heliograph deploy` lists what there is."""


class RolledBack(RegistryError):
    """A version did not prove itself in production, and the one before it answers again. The message says what it did worse."""


class StorageError(HeliographError):
    """Object storage cannot be reached or refuses, or a disk is full. Mend that, and the same command goes on."""


class RunError(HeliographError):
    """The run's folder is in use, holds something else, or lacks what the command needs."""


class ClusterError(HeliographError):
    """A cluster cannot be started, reached or asked for what it was. `heliograph plan` says what a run needs."""


class EndpointError(HeliographError):
    """The endpoint cannot be started or reached. Is `heliograph serve` running, and is the URL its own?"""


class PortInUse(EndpointError):
    """Something else listens on the port. Stop it, or name another one with --port."""


class RequestError(HeliographError):
    """A refused request. ``status``: the HTTP status that says so (400 unless given). ``retry_after``: seconds, 0 for never."""

    retry_after = 0

    def __init__(self, message: str, status: int = 400):
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return self.args[0]


class Overloaded(RequestError):
    """More is asked for than can be answered in time. Try again after `retry_after` seconds; clients of ours do."""

    retry_after = 1

    def __init__(self, message: str = "more is asked for than can be answered in time: try again", status: int = 503):
        super().__init__(message, status)


class CapsuleError(RequestError):
    """An encapsulated request or answer cannot be opened. Fetch the key configuration again: keys change."""
