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
    """Several problems of one project file, a line each."""


class DataError(HeliographError): ...


class ModelError(HeliographError): ...


class KeyStoreError(HeliographError): ...


class AccessError(HeliographError): ...


class AuditError(HeliographError): ...


class SealError(HeliographError): ...


class BundleError(HeliographError): ...


class SignatureError(BundleError): ...


class RegistryError(HeliographError): ...


class RolledBack(RegistryError): ...


class StorageError(HeliographError): ...


class RunError(HeliographError): ...


class ClusterError(HeliographError): ...


class EndpointError(HeliographError): ...


class PortInUse(EndpointError): ...


class RequestError(HeliographError):
    """A refused request. ``status``: the HTTP status that says so (400 unless given). ``retry_after``: seconds, 0 for never."""

    retry_after = 0

    def __init__(self, message: str, status: int = 400):
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return self.args[0]


class Overloaded(RequestError):
    retry_after = 1

    def __init__(self, message: str = "more is asked for than can be answered in time: try again", status: int = 503):
        super().__init__(message, status)


class CapsuleError(RequestError): ...
