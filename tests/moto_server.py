"""A server of S3 that nobody here wrote, so that its keys are S3's and not a file system's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Serve moto's S3 in this process until the block ends; yield its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def client(url: str, region: str = "us-east-1") -> Any:
    """Return a client of boto3 for the server, as a user has one."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name=region,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )


def fill(url: str, bucket: str, objects: Mapping[str, bytes]) -> None:
    """Make a bucket with these objects."""
    s3 = client(url)
    with contextlib.suppress(s3.exceptions.BucketAlreadyOwnedByYou):
        s3.create_bucket(Bucket=bucket)
    for key, body in objects.items():
        s3.put_object(Bucket=bucket, Key=key, Body=body)


def empty(url: str) -> None:
    """Remove all buckets."""
    s3 = client(url)
    for bucket in s3.list_buckets()["Buckets"]:
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"]):
            for found in page.get("Contents", ()):
                s3.delete_object(Bucket=bucket["Name"], Key=found["Key"])
        s3.delete_bucket(Bucket=bucket["Name"])
