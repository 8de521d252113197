"""Object stores on this machine, for tests: `python tests/stores.py s3|gs` serves one, with a bucket named `bucket`, until its
standard input ends, and prints its address.

moto answers for S3. gcp-storage-emulator answers for Google; two things that TensorStore's OCDBT needs are added to it: the
generation of what is read, and writes on the condition that an object is still of one.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

BUCKET = "bucket"


@contextmanager
def serving(scheme: str) -> Iterator[dict[str, str]]:
    """The environment in which `scheme`:// is a store on this machine, empty but for its bucket."""
    command = [sys.executable, __file__, scheme]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            assert address.startswith("http://"), f"{scheme}: no server"
            yield environment(scheme, address)
        finally:
            server.stdin.close()
            server.terminate()


@contextmanager
def of_this_process(scheme: str) -> Iterator[None]:
    """`scheme`:// is such a store in this process, whose libraries forget the one that they knew before."""
    import fsspec
    import pytest
    from etils.epath import backend

    from clipjax.data.storage import ranges

    with serving(scheme) as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
        backend.fsspec_backend._get_filesystem.cache_clear()
        ranges.forget()
        yield
    ranges.forget()


def environment(scheme: str, address: str) -> dict[str, str]:
    """What tells fsspec and TensorStore of a store at `address`, and keys that it takes."""
    if scheme == "s3":
        keys = dict(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1")
        return keys | {"AWS_ENDPOINT_URL": address}
    return {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs and Google's own client
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs asks Google itself of what kind the bucket is
    }


def serve_s3() -> str:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    keys = dict(aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1")
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket=BUCKET)
    return address


def serve_gs() -> str:
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def generation(storage, bucket: str, name: str) -> str:
        try:
            return storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"

    download, insert = objects.download, objects.insert

    def download_with_generation(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        found = generation(storage, request.params["bucket_name"], request.params["object_id"])
        if found != "0":
            response["x-goog-generation"] = found

    def insert_if_it_matches(request, response, storage, *args, **kwargs):
        wanted, names = request.query.get("ifGenerationMatch"), request.query.get("name")
        if wanted and names and generation(storage, request.params["bucket_name"], names[0]) != wanted[0]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        insert(request, response, storage, *args, **kwargs)

    objects.download, objects.insert = download_with_generation, insert_if_it_matches
    from gcp_storage_emulator import server  # binds the handlers

    port = free_port()
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).start()
    return f"http://127.0.0.1:{port}"


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    print({"s3": serve_s3, "gs": serve_gs}[sys.argv[1]](), flush=True)
    sys.stdin.read()
    os._exit(0)
