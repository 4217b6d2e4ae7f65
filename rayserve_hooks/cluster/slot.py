"""The adapter to ``ray.serve.llm``: our path in the one callback slot that Ray offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from rayserve_hooks.cluster._ray import CallbackBase
from rayserve_hooks.cluster.initialize import initialize
from rayserve_hooks.cluster.stacks import stack_of
from rayserve_hooks.core.log import logger
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.errors import FailureReport, HooksError, raise_from

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig


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
        try:
            self._stack = stack_of(llm_config)
            manager_of(self._stack)
        except HooksError as error:
            _raise_reported(error)

    async def run_callback(self, method_name: str) -> None:
        """Run one of Ray's callback methods; Ray's own turns any error into a bare Exception."""
        try:
            await getattr(self, method_name)()
        except HooksError as error:
            _raise_reported(error)

    async def on_before_node_init(self) -> None:
        """Run the whole path, hand the engine what it needs, and switch Ray's own step off."""
        config: Any = self.llm_config  # Ray's YAML loader makes the base class of the public one
        ctx = await initialize(config, self._stack, self.ctx.placement_group)
        self.ctx.placement_group = ctx.placement_group
        self.ctx.runtime_env = ctx.runtime_env
        self.ctx.run_init_node = False


def _raise_reported(error: HooksError) -> NoReturn:
    """Raise a failure as Ray Serve can show it to people.

    Serve makes a text of whatever ends a replica's start, with all frames: first of the causes,
    then of the error. So a `FailureReport` comes first.
    """
    logger.debug("the whole traceback:", exc_info=error)
    raise_from(error.with_traceback(None), FailureReport.of(error))
