"""Make a Llama of two layers with random weights: small enough to serve on two CPU cores."""

import sys
import tempfile
from pathlib import Path

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
CORPUS = ["user assistant system hello world the quick brown fox jumps over the lazy dog"]


def make_tiny_model(folder: Path) -> Path:
    """Write the model and its tokenizer to ``folder``, unless they are there already."""
    if folder.exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        # With a multiple of 32, vLLM computes attention with AMX where the CPU has it, and there
        # two engines that generate at the same time have ended with SIGILL (vLLM 0.29).
        head_dim=80,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        made = Path(unfinished, folder.name)
        fast.save_pretrained(made)
        LlamaForCausalLM(config).save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:  # another process may have been first
            if not folder.exists():
                raise
    return folder


if __name__ == "__main__":
    print(make_tiny_model(Path(sys.argv[1])))
