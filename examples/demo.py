"""Serve a real model through several stacked callbacks, and check what each of them did."""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import requests
from tiny_model import make_tiny_model

CACHE = Path(__file__).parent.parent / ".cache"
TIMELINES = CACHE / "startup"
PROMPT = [{"role": "user", "content": "hello world"}]
ENGINE = {
    "placement_group_config": {"bundles": [{"CPU": 1}]},
    "engine_kwargs": {"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 4},
    "log_engine_metrics": False,
}


def main() -> int:
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayserve-hooks-")))
        stack.enter_context(processes.none_left())
        with step("making a tiny model"):
            model = make_tiny_model(CACHE / "tiny-llama")
        with step("copying it to a bucket on loopback"):
            shutil.copytree(model, work / "buckets" / "models" / "tiny")
            store_url = stack.enter_context(serving(work / "buckets"))
        with step("starting Ray"):
            url, metrics_url = start_ray(stack)
        with step("importing Ray Serve LLM"):
            import rayserve_hooks  # noqa: F401
            from rayserve_hooks import LLMConfig
        checks: list[tuple[str, Callable[[], str]]] = []

        stacked = stacked_config(LLMConfig, work, store_url)
        print_order(stacked)
        with step("serving the model with the callbacks stacked"):
            serve_app(stacked)
        print_trace(work / "stacked.json")
        with step("asking for a chat completion"):
            print(f"\n  answer: {chat(url, PROMPT)!r}\n")
        checks += [
            ("my own callback", lambda: check_engine_argument(url)),
            ("download policy", lambda: check_download_policy(work, model)),
            ("start-up metrics", lambda: check_metrics(metrics_url)),
            ("start-up timeline", check_timeline),
            ("custom placement group", check_placement_group),
        ]
        failures = run_checks(checks)

        with step("serving it again, with a custom initialization"):
            serve_app(custom_config(LLMConfig, work, model))
        print_trace(work / "custom.json")
        failures += run_checks(
            [("full custom initialization", lambda: check_custom(url, work / "custom.json"))]
        )
    print("\nfailed" if failures else "\nall checks passed; no process is left")
    return 1 if failures else 0


@contextlib.contextmanager
def serving(buckets: Path) -> Iterator[str]:
    """Serve a folder as S3 does, by the server of the tests; give its address."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import s3

    with s3.serving(buckets) as server:
        yield server.url


def stacked_config(llm_config: Any, work: Path, store_url: str) -> Any:
    """Stack callbacks: by short name, by path, with and without arguments."""
    return llm_config(
        model_id="tiny",
        model_loading_config={"model_id": "tiny", "model_source": "s3://anonymous@models/tiny"},
        callbacks=[
            writer(work / "stacked.json"),
            "startup_metrics",
            {"callback": "startup_timeline", "kwargs": {"folder": str(TIMELINES), "keep": 5}},
            {
                "callback": "custom_placement_group",
                "kwargs": {"bundles": [{"CPU": 1}], "strategy": "STRICT_PACK", "name": "demo"},
            },
            {
                "callback": "download_policy",
                "kwargs": {"local": "MODEL_AND_TOKENIZER", "workers": "TOKENIZER_ONLY"},
            },
            "my_module.MyCallback",
        ],
        runtime_env={
            "env_vars": {
                "AWS_ENDPOINT_URL": store_url,
                "HF_HOME": str(work / "hf"),
                "VLLM_CPU_KVCACHE_SPACE": "1",
            }
        },
        **ENGINE,
    )


def writer(path: Path) -> dict[str, Any]:
    return {"callback": "trace_writer:TraceWriter", "kwargs": {"path": str(path)}}


def custom_config(llm_config: Any, work: Path, model: Path) -> Any:
    return llm_config(
        model_id="tiny",
        model_loading_config={"model_id": "tiny", "model_source": "nobody/no-such-model"},
        callbacks=[
            writer(work / "custom.json"),
            {"callback": "custom_initialization", "kwargs": {"model_path": str(model)}},
        ],
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
        **ENGINE,
    )


def start_ray(stack: contextlib.ExitStack) -> tuple[str, str]:
    """Start a local Ray and Serve; return the URLs of Serve and of Ray's Prometheus endpoint."""
    import ray
    from ray import serve

    http_port, metrics_port = processes.free_port(), processes.free_port()
    ray.init(
        address="local",
        num_cpus=8,  # logical: the groups' bundles, the replicas and the ingress
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _metrics_export_port=metrics_port,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    stack.callback(ray.shutdown)
    exit_on_sigterm()  # again: ray.init() has set a handler of its own
    serve.start(http_options={"host": "127.0.0.1", "port": http_port})
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return f"http://127.0.0.1:{http_port}", f"http://127.0.0.1:{metrics_port}/metrics"


def serve_app(config: Any) -> None:
    """Deploy with Ray's own builder, in the place of what ran before."""
    from ray import serve
    from ray.serve.llm import build_openai_app

    serve.run(build_openai_app({"llm_configs": [config]}), name="demo")


def chat(url: str, messages: list[dict[str, str]]) -> str:
    body = {"model": "tiny", "messages": messages, "max_tokens": 8}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def check_engine_argument(url: str) -> str:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello " * 300}],
        "max_tokens": 8,
    }
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 400, answer.text
    assert "192" in answer.text, answer.text
    return "the engine refuses a prompt longer than the 192 tokens it set"


def check_download_policy(work: Path, model: Path) -> str:
    found = sorted((work / "hf" / "hub" / "models--tiny" / "snapshots").glob("*/*"))
    expected = sorted(path.name for path in model.iterdir())
    assert [path.name for path in found] == expected, found
    assert all(path.read_bytes() == (model / path.name).read_bytes() for path in found)
    return f"the replica's node fetched model and tokenizer, {len(found)} files, byte-equal"


def check_metrics(url: str) -> str:
    deadline = time.monotonic() + 30
    name = "ray_rayserve_hooks_phase_seconds_total"
    while time.monotonic() < deadline:
        lines = [
            line
            for line in requests.get(url, timeout=10).text.splitlines()
            if line.startswith(name) and 'phase="total"' in line
        ]
        if lines:
            return f"Prometheus scrapes {name}, total {float(lines[0].split()[-1]):.2f} s"
        time.sleep(0.5)  # Ray's agent collects in intervals and offers nothing to wait on
    raise AssertionError(f"{url} has no {name}")


def check_timeline() -> str:
    page = max(TIMELINES.glob("startup-*.html"))  # the names begin with the time
    text = page.read_text()
    assert "MyCallback on_after_init" in text, page
    assert " bytes, " in text, page
    return f"open file://{page.resolve()} in a browser, or {page.stem}.json in Perfetto"


def check_placement_group() -> str:
    from ray.util.placement_group import placement_group_table

    groups = [g for g in placement_group_table().values() if g["name"] == "demo"]
    assert [(g["state"], g["strategy"]) for g in groups] == [("CREATED", "STRICT_PACK")], groups
    return f"Ray's table has it: {groups[0]['strategy']}, bundles {groups[0]['bundles']}"


def check_custom(url: str, trace: Path) -> str:
    calls = {(call["callback"], call["hook"]): call for call in json.loads(trace.read_text())}
    assert calls["custom_initialization", "on_before_init"]["outcome"] == "handled", calls
    ran = {hook for (_, hook), call in calls.items() if call["outcome"] != "skipped"}
    assert "on_before_download" not in ran, calls
    chat(url, PROMPT)
    return "no node was prepared, and its own model answers; the configured one does not exist"


def run_checks(checks: list[tuple[str, Callable[[], str]]]) -> int:
    failures = 0
    for title, check in checks:
        try:
            print(f"  \N{CHECK MARK} {title}: {check()}", flush=True)
        except Exception as error:
            failures += 1
            print(f"  \N{MULTIPLICATION X} {title}: {error!r}", flush=True)
    return failures


def print_order(config: Any) -> None:
    from rayserve_hooks import get_plugin_manager
    from rayserve_hooks.trace import format_table

    order = get_plugin_manager(config).run_order()
    print("\nresolved order\n")
    print(format_table(("hook", "callbacks"), [(hook, ", ".join(order[hook])) for hook in order]))


def print_trace(path: Path) -> None:
    from rayserve_hooks.trace import Change, Trace, TraceEntry

    trace = Trace()
    for call in json.loads(path.read_text()):
        changes = tuple(Change(**change) for change in call.pop("changes"))
        if call["callback"] != "TraceWriter":
            trace.append(TraceEntry(**call, changes=changes))
    print(f"\nwho ran where\n\n{trace.table()}\n")


def exit_on_sigterm() -> None:
    """Unwind as for Ctrl-C, with the exit code a shell expects."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Say what is going on, and every five seconds that it still is."""
    started = time.monotonic()
    done = threading.Event()

    def report() -> None:
        while not done.wait(5):
            print(f"... {title}, {time.monotonic() - started:.0f} s", flush=True)

    print(f"{title} ...", flush=True)
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    print(f"{title}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    # A shell starts a background job with Ctrl-C ignored; this one must be able to clean up.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_on_sigterm()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
