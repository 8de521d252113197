"""Makes Orbax work on s3://. orbax-checkpoint 0.12 writes arrays to local folders and gs:// only, although TensorStore, which it
uses, has a driver for S3 (google/orbax issue 359, pull request 2739)."""

import os
import re
from functools import cache, wraps
from pathlib import Path
from typing import Any

from clipjax.files import scheme

AMAZON = re.compile(r"https?://[^/]*\.amazonaws\.com(\.cn)?/?")


def options(workdir: Path) -> dict[str, Any]:
    """Further arguments for the CheckpointManagerOptions of a workdir: none unless it is on s3://.

    There, as on gs://, a commit file marks a finished checkpoint, because an object store can't rename a folder in one step.
    """
    if scheme(workdir) != "s3":
        return {}
    import orbax.checkpoint as ocp

    patch_orbax()
    return {"temporary_path_class": ocp.path.atomicity.CommitFileTemporaryPath}


@cache
def patch_orbax() -> None:
    """Makes Orbax write an s3:// folder in its layout for gs://, with TensorStore's driver for S3."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    build = tensorstore_utils.build_kvstore_tspec

    @wraps(build)
    def with_s3(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = re.match("s3:/+", os.fspath(directory))
        if found is None:
            return build(directory, *args, **kwargs)
        return _on_s3(build("gs://" + os.fspath(directory)[found.end() :], *args, **kwargs))

    tensorstore_utils.build_kvstore_tspec = with_s3


def _on_s3(spec: Any) -> Any:
    """A TensorStore spec with the S3 driver in place of Google's."""
    if isinstance(spec, list):
        return [_on_s3(x) for x in spec]
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        return spec | {"driver": "s3"} | _account()
    return {name: _on_s3(x) for name, x in spec.items()}


@cache
def _account() -> dict[str, Any]:
    """TensorStore's options for the account: the endpoint and where the keys are.

    The endpoint, if the store is not Amazon's: TensorStore reads neither AWS_ENDPOINT_URL nor a profile's endpoint_url. The
    keys, if they are in the environment: otherwise TensorStore warns about every other source where it finds none.
    """
    import fsspec

    files = fsspec.filesystem("s3")
    files.connect()
    meta = files.s3.meta
    keys = {"aws_credentials": {"type": "environment"}} if os.environ.get("AWS_ACCESS_KEY_ID") else {}
    if AMAZON.fullmatch(meta.endpoint_url):
        return keys
    return keys | {"endpoint": meta.endpoint_url, "aws_region": meta.region_name or "us-east-1"}
