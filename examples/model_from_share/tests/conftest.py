"""The kit of rayserve_hooks, which has the fixture ``run_stack``."""

pytest_plugins = ["rayserve_hooks.testing"]
