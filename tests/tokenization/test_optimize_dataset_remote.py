"""Step 1 reading from URLs: a real S3 server on loopback, and a file system that only fsspec knows."""

from __future__ import annotations

import pytest

from utils.manifest import read_manifest


@pytest.fixture(scope="module")
def s3_endpoint():
    """Address of an S3 server (moto's) on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def test_s3_gives_the_same_dataset_as_the_local_files(s3_endpoint, parquet_dir, tokenizer_dir, tmp_path, run_script):
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=f"http://{s3_endpoint}",
        aws_access_key_id="testing",
        aws_secret_access_key="testing-secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="corpus")
    for path in sorted(parquet_dir.rglob("*.parquet")):
        client.upload_file(str(path), "corpus", f"fineweb/{path.relative_to(parquet_dir)}")
    client.put_object(Bucket="corpus", Key="fineweb/README.md", Body=b"not data")

    url = f"s3://corpus/fineweb?scheme=http&endpoint_override={s3_endpoint}"
    outputs = {"local": str(parquet_dir), "remote": url}
    chunks = {}
    for name, input_dir in outputs.items():
        process = run_script(
            "optimize_dataset.py",
            f"--input_dir={input_dir}",
            f"--tokenizer_dir={tokenizer_dir}",
            f"--output_dir={tmp_path / name}",
            "--val_fraction=0.1",
            "--unit_bytes=100000",
            "--address=local",  # the nodes of a cluster that another test started have no credentials
            env=CREDENTIALS,
        )
        assert "testing-secret" not in process.stdout + process.stderr
        chunks[name] = {
            path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.bin")
        }
    assert chunks["remote"] == chunks["local"] and chunks["local"]
    assert read_manifest(tmp_path / "remote")["inputs"] == read_manifest(tmp_path / "local")["inputs"]

    missing = run_script(
        "optimize_dataset.py",
        f"--input_dir={url.replace('fineweb', 'nothing')}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'none'}",
        env=CREDENTIALS,
        check=False,
    )
    assert missing.returncode == 2 and "--input_dir=s3://corpus/nothing" in missing.stderr


def test_fsspec_file_system(parquet_dir, tokenizer_dir, tmp_path, run_script):
    """`simplecache::file://` stands for what pyarrow does not know and fsspec does, as hf:// in older releases."""
    run_script(
        "optimize_dataset.py",
        f"--input_dir=simplecache::file://{parquet_dir}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
        "--val_fraction=0.1",
        "--address=local",
    )
    rows = sum(entry["rows"] for entry in read_manifest(tmp_path / "out")["inputs"])
    content = read_manifest(tmp_path / "out")["content"]
    assert content["train"]["documents"] + content["val"]["documents"] == rows > 0


def test_unknown_scheme_is_a_user_error(tokenizer_dir, tmp_path, run_script):
    process = run_script(
        "optimize_dataset.py",
        "--input_dir=nonsense://somewhere/x",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
        check=False,
    )
    assert process.returncode == 2 and "--input_dir=nonsense://somewhere/x" in process.stderr
    assert "Traceback" not in process.stderr
