"""What production turns on, a line for each."""

startup_metrics = {"callback": "startup_metrics"}

startup_timeline = {"callback": "startup_timeline", "kwargs": {"folder": "~/startup"}}

notify = {"callback": "notify", "kwargs": {"url_variable": "WEBHOOK_URL"}}

compile_cache = {
    "callback": "compile_cache",
    "kwargs": {"store": "s3://bucket/compile", "key_variable": "COMPILE_CACHE_KEY"},
}

engine_modules = {
    "callback": "engine_modules",
    "kwargs": {"modules": ["my_models", "my_parsers:register"]},
}

warm_up = {"callback": "warm_up", "kwargs": {"requests": 4, "max_tokens": 16}}

callbacks = [
    startup_metrics,
    startup_timeline,
    notify,
    compile_cache,
    engine_modules,
    warm_up,
]
