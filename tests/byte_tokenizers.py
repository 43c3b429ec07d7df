"""Small tokenizers, made by the libraries themselves."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    *, merges=(), specials=("<s>", "</s>"), bos="<s>", eos="</s>", adds_eos=False
) -> PreTrainedTokenizerFast:
    """One token a byte but for the merges; puts BOS before a text by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*specials, *alphabet, *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A" + adds_eos * f" {eos}",
            special_tokens=[(token, vocab[token]) for token in specials],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos
    )
