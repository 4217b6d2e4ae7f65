"""The quick start: serve a tiny model with callbacks, and ask it."""

from pathlib import Path

import ray
import requests
from ray import serve
from ray.serve.llm import build_openai_app
from tiny_model import make_tiny_model

from rayserve_hooks import LLMConfig, get_plugin_manager

config = LLMConfig(model_id="tiny", callback="my_module.MyCallback")

config = LLMConfig(
    model_id="tiny",
    callbacks=[
        "startup_metrics",
        {"callback": "my_module:MyCallback", "kwargs": {"max_model_len": 128}},
    ],
)

model = make_tiny_model(Path(".cache/tiny-llama").absolute())
config = LLMConfig(
    model_id="tiny",
    model_loading_config={"model_source": str(model)},
    callbacks=["startup_metrics", "my_module.MyCallback"],
    placement_group_config={"bundles": [{"CPU": 1}]},
    engine_kwargs={"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 4},
    log_engine_metrics=False,
    runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
)
for hook, callbacks in get_plugin_manager(config).run_order().items():
    print(hook, callbacks)

ray.init(address="local", num_cpus=4)
serve.run(build_openai_app({"llm_configs": [config]}))

question = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
answer = requests.post("http://127.0.0.1:8000/v1/chat/completions", json=question, timeout=60)
print(answer.json()["choices"][0]["message"]["content"])

ray.shutdown()
