"""The adapter to ``ray.serve.llm``: our path in the one callback slot that Ray offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster._ray import CallbackBase
from rayserve_hooks.cluster.initialize import initialize, prepare
from rayserve_hooks.cluster.stacks import stack_of
from rayserve_hooks.cluster.supervision import Initialization
from rayserve_hooks.core.hooks import CLEAN_UP, CONFIGURE, ENGINE_PROCESS, NEED_ENGINE, SHUTDOWN
from rayserve_hooks.core.log import fields, logger
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.errors import FailureReport, HooksError, raise_from

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup

    from rayserve_hooks.context import CallbackCtx


class HooksCallback(CallbackBase):
    """A Ray callback that runs a stack of ours.

    Ray Serve LLM builds it in each replica from ``callback_config``::

        callback_config:
          callback_class: rayserve_hooks.HooksCallback
          callback_kwargs:
            callbacks: [...]

    Args:
        llm_config: The deployment's config; Ray passes it.
        raise_error_on_callback: False makes ``on_error: warn`` the default of every callback;
            Ray passes it.
        ctx_kwargs: The fields of Ray's own context; Ray passes it.
        **kwargs: ``callbacks`` and ``time_limits``; forms: see
            `rayserve_hooks.core.stack.CallbackStack.parse`. Made by our ``LLMConfig`` it is
            ``stack``.

    Raises:
        CallbackConfigError: A callback cannot be imported or built, or is none.
    """

    def __init__(
        self,
        llm_config: LLMConfig,
        raise_error_on_callback: bool = True,
        ctx_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(llm_config, raise_error_on_callback, ctx_kwargs, **kwargs)
        # Ray's YAML loader makes the base class of the public one.
        self._config: Any = llm_config
        self._given: PlacementGroup | None = self.ctx.placement_group
        self._start: Initialization | None = None  # that our engine supervises
        self._unattended: Initialization | None = None
        try:
            self._stack = stack_of(llm_config)
            manager_of(self._stack)
        except HooksError as error:
            raise_reported(error)

    def __reduce__(self) -> tuple[Any, ...]:
        # It is a part of its config, of which each process makes its own callback.
        return type(None), ()

    async def run_callback(self, method_name: str) -> None:
        """Run one of Ray's callback methods; Ray's own turns any error into a bare Exception."""
        try:
            await getattr(self, method_name)()
        except HooksError as error:
            if self._start is not None:  # it is reported when it has been cleaned up
                raise
            raise_reported(error)

    async def on_before_node_init(self) -> None:
        """Run the whole path, hand the engine what it needs, and switch Ray's own step off."""
        self._warn_of_what_cannot_run()
        if self._start is None:
            this = Initialization(self._config, self._stack, self.ctx.placement_group)
            async with this.supervised():
                await prepare(this)
            self._unattended = this  # what the engine's processes need lives as long
        else:
            this = self._start
            await prepare(this)
            this.begin_engine()
        self._hand_over(this.ctx)

    def begin(self) -> Initialization:
        """Return the start of a replica, which our engine class supervises to its end."""
        self._start = Initialization(self._config, self._stack, self.ctx.placement_group)
        return self._start

    async def initialize(self, placement_group: PlacementGroup | None) -> CallbackCtx:
        """Run the whole path outside of Ray's slot; see `rayserve_hooks.initialize_node`."""
        ctx = await initialize(self._config, self._stack, placement_group or self._given)
        self._hand_over(ctx)
        return ctx

    def _hand_over(self, ctx: CallbackCtx) -> None:
        self.ctx.placement_group = ctx.placement_group
        self.ctx.runtime_env = ctx.runtime_env
        self.ctx.run_init_node = False

    def _warn_of_what_cannot_run(self) -> None:
        """Warn once of hooks that the app's builder, or the installed Ray, leaves out."""
        order, configured = manager_of(self._stack).run_order(), self._stack.configured
        left_out = {CONFIGURE: order[CONFIGURE]}
        if configured is not None:
            left_out[CONFIGURE] = [
                name for name in order[CONFIGURE] if name not in configured.callbacks
            ]
        if self._start is None:
            left_out |= {hook: order[hook] for hook in NEED_ENGINE}
        elif not _ray.awaits_shutdown():
            left_out[SHUTDOWN] = order[SHUTDOWN]
        texts = [
            f"{hook} of {', '.join(map(repr, dict.fromkeys(names)))}{_MEANT.get(hook, '')}"
            for hook, names in left_out.items()
            if names
        ]
        if not texts:
            return
        advice = []
        if configured is None:
            advice.append("build the app with rayserve_hooks:build_openai_app, or its other forms")
        elif left_out[CONFIGURE]:
            advice.append("have these callbacks, switched on, where the app is built, too")
        if self._start is None:
            named = f"set {_ray.ENGINE_VARIABLE}={_ray.HOOKS_ENGINE} in the config's runtime_env"
            advice.append(f"or, but for on_configure, {named}" if configured is None else named)
        elif left_out.get(SHUTDOWN):
            advice.append("on_shutdown needs Ray 2.58 or newer")
        text = "not all hooks run in this replica: %s; %s"
        logger.warning(text, "; ".join(texts), "; ".join(advice), extra=fields())


# Of these hooks a part runs all the same.
_MEANT = {
    CLEAN_UP: " (after its nodes are ready)",
    ENGINE_PROCESS: " (it does, but nothing checks that it has)",
}


def callback_of(config: LLMConfig) -> CallbackBase:
    """Return a config's callback; the first call makes it.

    Outside of a replica Ray makes a placement group with it. Of a callback of ours the
    initialization makes the group, and the same callback has it then.
    """
    already = _ray.callback_made(config)
    if already is not None:
        return already
    named = config.callback_config.callback_class
    if not _ray.runs_hooks(named) or _ray.has_placement_group():
        return _ray.LLMConfig.get_or_create_callback(config)  # type: ignore[return-value]
    try:
        callback = HooksCallback(
            llm_config=config,
            raise_error_on_callback=config.callback_config.raise_error_on_callback,
            ctx_kwargs={
                "worker_node_download_model": _ray.download_mode_of_ray(
                    _ray.default_download_mode(config)
                ),
                "runtime_env": _ray.initial_runtime_env(config),
            },
            **config.callback_config.callback_kwargs,
        )
    except HooksError as error:  # nothing of Serve's shows it here
        report = error.__cause__
        raise_from(error, report and report.__context__)
    _ray.set_callback(config, callback)
    return callback


def raise_reported(error: HooksError) -> NoReturn:
    """Raise a failure as Ray Serve can show it to people.

    Serve makes a text of whatever ends a replica's start, with all frames: first of the causes,
    then of the error. So a `FailureReport` comes first.
    """
    logger.debug("the whole traceback:", exc_info=error)
    raise_from(error.with_traceback(None), FailureReport.of(error))
