"""The class behind `own_model.ARCHITECTURE`; vLLM imports it in a process of its own, too."""

from vllm.model_executor.models.llama import LlamaForCausalLM


class NobodysForCausalLM(LlamaForCausalLM):
    """A Llama by a name that no library knows."""
