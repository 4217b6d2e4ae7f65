"""What brings files besides the default download, a line for each."""

cloud_files = {
    "callback": "cloud_files",
    "kwargs": {"paths": [("s3://bucket/templates", "/opt/templates")]},
}

hf_prefetch = {
    "callback": "hf_prefetch",
    "kwargs": {"repo_id": "Qwen/Qwen3-8B", "revision": "main"},
}

lora_prefetch = {"callback": "lora_prefetch", "kwargs": {"parallel_adapters": 16}}

callbacks = [cloud_files, lora_prefetch, hf_prefetch]
