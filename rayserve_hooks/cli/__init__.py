"""``rayserve-hooks``: see and check callbacks and machines before anything is deployed."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rayserve_hooks import __version__
from rayserve_hooks.errors import HooksError

_TRUST = (
    "The callbacks that the file names are imported and built, which runs code of theirs: use it "
    "for files that you trust."
)

_CHECKED = (
    "The file is checked by Ray's rules, without Ray: keys, kinds of values, names that must "
    "differ. Not seen are applications made by Python code of your own, which are named on "
    "standard error, and what only Ray, the engine or the cluster can tell, such as the values in "
    "engine_kwargs and deployment_config. Exit code 1: something is wrong, or there is no LLM "
    "config at all."
)

_DOCTOR = (
    "Look for what a deployment needs: Ray and vLLM, this package, the model's bucket with these "
    "credentials, the cache folder and its space, the lock folder, and what callbacks add. The "
    "variables of the file's runtime_env count. Exit code 1: there is a problem."
)

_PREFETCH = (
    "Run the node stage on nodes of a running cluster, without an engine: on_before_download and, "
    "unless a callback brings the model, its download. Every node is taken for a worker's. Run it "
    "where ray.serve.llm can be imported. Exit code 1: a node has failed."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0: what was asked for has been printed. What cannot be seen in a config, such as an
            application that is made by Python code, has been named on standard error.
        1: the config is wrong, or there is no LLM config in it; every problem has been printed to
            standard error, or, by ``check --json``, as JSON. Or ``doctor`` has found a problem, or
            a node of ``prefetch`` has failed.
        2: no command was given; the help has been printed to standard error.
        130: it was interrupted.
        141: whoever read the output has closed it, as ``head`` does.

    Raises:
        SystemExit: The command line itself is wrong (exit code 2), or ``--help`` was asked for.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    if options.command is None:  # argparse's own error would not say which there are
        parser.print_help(sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):  # a name may be no text
        with contextlib.suppress(AttributeError):  # it is somebody's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    folder = getattr(options, "working_dir", None) or getattr(options, "app_dir", None)
    if folder:  # as 'serve run' does: callbacks are often modules beside the config
        sys.path.insert(0, str(Path(folder).absolute()))
    try:
        # Each command imports what it needs: help and completion are there at once.
        command = importlib.import_module(f"{__name__}.{options.module}")
        # What the callbacks' modules print is no part of a table, or of JSON.
        with contextlib.redirect_stdout(sys.stderr):
            text, code = command.run(options)
        print(text, flush=True)
    except HooksError as error:
        print(f"rayserve-hooks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Or Python complains when it closes the stream at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayserve-hooks",
        description="See and check callbacks and machines before anything is deployed.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON for programs")
    imports = argparse.ArgumentParser(add_help=False)
    imports.add_argument("--app-dir", default=".", help="folder to import callbacks from")
    working_dir = argparse.ArgumentParser(add_help=False)
    working_dir.add_argument(
        "--working-dir",
        metavar="DIR",
        help="the folder that is the cluster's working_dir; callbacks are imported from it",
    )
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("config", help="the YAML file that 'serve run' and 'serve deploy' take")
    cluster = argparse.ArgumentParser(add_help=False)
    cluster.add_argument(
        "--address", help="of the Ray cluster; else RAY_ADDRESS, or this machine's"
    )
    cluster.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="NODE",
        help="a node's address, or the beginning of its id; may be repeated; else all",
    )

    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(
        name: str, module: str, summary: str, description: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, parents=[as_json, *parents], help=summary, description=description
        )
        made.set_defaults(module=module)
        return made

    in_order = add(
        "order",
        "listing",
        "print the callbacks of a Serve config in run order",
        f"Print the callbacks of a Serve config in run order. {_TRUST} {_CHECKED}",
        imports,
        config,
    )
    in_order.add_argument(
        "--import-only",
        action="store_true",
        help="import the callbacks' modules, but build none of them",
    )
    add(
        "plugins",
        "listing",
        "list the callbacks with a short name",
        "List the callbacks with a short name; importing them runs code of theirs.",
        imports,
    )
    add(
        "schema",
        "listing",
        "print the JSON Schema of a Serve config, for editors",
        "Print the JSON Schema of a Serve config, for editors; with and without --json.",
    )
    add(
        "check",
        "check",
        "check a Serve config and its callbacks, for CI",
        f"Check a Serve config and its callbacks; print no table. {_TRUST} {_CHECKED}",
        imports,
        working_dir,
        config,
    )
    doctor = add(
        "doctor",
        "doctor",
        "look whether this machine, or each node, can serve a Serve config",
        f"{_DOCTOR} {_TRUST}",
        imports,
        working_dir,
        cluster,
        config,
    )
    doctor.add_argument(
        "--cluster", action="store_true", help="look at the nodes of a running Ray cluster, too"
    )
    prefetch = add(
        "prefetch",
        "prefetch",
        "bring the models of a Serve config to the nodes of a running cluster",
        f"{_PREFETCH} {_TRUST}",
        imports,
        working_dir,
        cluster,
        config,
    )
    prefetch.add_argument(
        "--mode",
        choices=("EXCLUDE_SAFETENSORS", "MODEL_AND_TOKENIZER", "NONE", "TOKENIZER_ONLY"),
        help="what to download; else what Ray downloads for the config",
    )
    return parser
