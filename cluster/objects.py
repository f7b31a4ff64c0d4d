"""Object storage: a bucket of S3, or of anything that speaks its protocol (AWS_ENDPOINT_URL).

Credentials, region and endpoint are those that boto3 finds. Large objects go in parts, several at a time; the digest of a file is
the SHA-256 of its parts' SHA-256s, which whoever sends computes on the way, and whoever fetches checks. Down it is boto3's own
transfer: ranges in threads of ours took twice as long (`bench/storage.py`). What fails for a moment is tried again after a while.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ..errors import StorageError

PART_BYTES = 16 << 20
THREADS = 8
SCHEME = "s3://"
EXPLAINED = {
    "NoSuchKey": "somebody took away what was stored there: the same command, once more, stores what this machine has",
    "NoSuchBucket": "there is no such bucket: make it, or correct its name",
    "InvalidAccessKeyId": "the access key is not known there: correct AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the secret key is wrong: correct AWS_SECRET_ACCESS_KEY or the profile",
    "AccessDenied": "these credentials may not do that: they need to list, read, write and delete below it",
    "RequestTimeTooSkewed": "this machine's clock is wrong by more than the storage allows: set it right",
    "ExpiredToken": "the credentials have expired: sign in again",
}


class Changed(Exception):
    """An object is not what it was seen to be."""


class Bucket:
    """The objects below `s3://BUCKET/PREFIX`. Raises StorageError, a line with what to do, wherever the storage refuses."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if not url.startswith(SCHEME) or len(parts.netloc) < 3:
            raise StorageError(f"{url}: is no place in object storage: write s3://BUCKET/FOLDER")
        self.url, self.name = url.rstrip("/"), parts.netloc
        self.prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    @property
    def client(self) -> Any:
        if "_client" not in self.__dict__:
            import boto3
            from botocore.config import Config

            config = Config(
                retries={"mode": "standard", "total_max_attempts": 6},
                max_pool_connections=2 * THREADS,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            session = boto3.Session()
            self._client = session.client("s3", config=config, region_name=session.region_name or "us-east-1")
        return self._client

    def get(self, key: str) -> tuple[bytes, str] | None:
        """(content, tag) of an object; None where there is none."""

        def read() -> tuple[bytes, str] | None:
            try:
                answer = self.client.get_object(Bucket=self.name, Key=self.prefix + key)
            except self.client.exceptions.NoSuchKey:
                return None
            return answer["Body"].read(), answer["ETag"]

        return self._explained(read)

    def put(self, key: str, content: bytes, seen: str | None) -> str:
        """Write an object if it is still what was seen (its tag), or still not there (None); its new tag. Raises Changed."""
        condition: dict[str, str] = {"IfMatch": seen} if seen else {"IfNoneMatch": "*"}

        def write() -> str:
            return self.client.put_object(Bucket=self.name, Key=self.prefix + key, Body=content, **condition)["ETag"]

        return self._explained(write)

    def names(self, below: str = "") -> set[str]:
        """Of all objects below a folder, from the bucket's prefix on."""

        def look() -> set[str]:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix + below)
            return {o["Key"].removeprefix(self.prefix) for page in pages for o in page.get("Contents", ())}

        return self._explained(look)

    def delete(self, keys: Iterable[str]) -> None:
        waiting = sorted(keys)
        for start in range(0, len(waiting), 1000):
            gone = {"Objects": [{"Key": self.prefix + key} for key in waiting[start : start + 1000]], "Quiet": True}
            self._explained(lambda gone=gone: self.client.delete_objects(Bucket=self.name, Delete=gone))

    def send(self, key: str, content: bytes) -> None:
        """Write an object, whatever was there."""
        self._explained(lambda: self.client.put_object(Bucket=self.name, Key=self.prefix + key, Body=content))

    def upload(self, file: Path, key: str) -> str:
        """Send a file, a large one in parts; the digest of what was sent."""
        size = file.stat().st_size
        if size <= PART_BYTES:
            content = file.read_bytes()
            self.send(key, content)
            return digest_of(io.BytesIO(content))
        key = self.prefix + key
        digests: dict[int, bytes] = {}
        with file.open("rb") as opened:

            def send(number: int, upload: str) -> dict[str, Any]:
                content = os.pread(opened.fileno(), PART_BYTES, number * PART_BYTES)
                digests[number] = hashlib.sha256(content).digest()
                sent = self.client.upload_part(Bucket=self.name, Key=key, UploadId=upload, PartNumber=number + 1, Body=content)
                return {"PartNumber": number + 1, "ETag": sent["ETag"]}

            def write() -> None:
                upload = self.client.create_multipart_upload(Bucket=self.name, Key=key)["UploadId"]
                try:
                    with ThreadPoolExecutor(THREADS) as threads:
                        parts = list(threads.map(lambda n: send(n, upload), range(-(-size // PART_BYTES))))
                    self.client.complete_multipart_upload(
                        Bucket=self.name, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
                    )
                except BaseException:
                    self.client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload)
                    raise

            self._explained(write)
        return hashlib.sha256(b"".join(digests[n] for n in sorted(digests))).hexdigest()

    def download(self, key: str, file: Path, digest: str, told: Callable[[int], None] = lambda done: None) -> None:
        """Into a file that is there whole or not at all. Raises StorageError when it is not what its digest says."""
        aside = file.with_name(f".{file.name}.{os.getpid()}.part")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._explained(lambda: self.client.download_file(self.name, self.prefix + key, str(aside), Callback=told))
            with aside.open("rb") as opened:
                found = digest_of(opened)
            if found != digest:
                raise StorageError(f"{self.url}/{key}: is not what was stored (its SHA-256 differs): restore it, or start anew")
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    def _explained(self, ask: Callable[[], Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return ask()
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if code in ("PreconditionFailed", "ConditionalRequestConflict") or status in (409, 412):
                raise Changed(self.url) from None
            raise StorageError(f"{self.url}: {EXPLAINED.get(code) or str(error).splitlines()[0][:200]}") from None
        except BotoCoreError as error:
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                why = "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            else:
                why = str(error).splitlines()[0][:200]
            raise StorageError(f"{self.url}: {why}") from None


def digest_of(content: IO[bytes]) -> str:
    """SHA-256 of the SHA-256s of parts of `PART_BYTES`."""
    parts = [hashlib.sha256(content.read(PART_BYTES)).digest()]
    while part := content.read(PART_BYTES):
        parts.append(hashlib.sha256(part).digest())
    return hashlib.sha256(b"".join(parts)).hexdigest()
