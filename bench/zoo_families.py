"""Name of a family -> its untrained model and its tokenizer.

Shapes differ on purpose (layers, width, heads, head size), so that nothing downstream can rely on one.
Embeddings are tied everywhere to keep the weights small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

POSITIONS = 512


@dataclass(frozen=True)
class Family:
    """What makes a family: class, shape, special tokens, and the way it writes a chat."""

    model: type
    config: type
    shape: dict
    specials: tuple[str, ...]  # in id order
    pad: str
    eos: str  # ends a raw text
    turn: str  # ends an answer
    bos: str | None
    chat_template: str
    second: bool = False  # speaks the second language


# A chat template renders {"role", "content"} messages; the story follows the generation prompt directly.
_GPT2 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Story: {{ m['content'] }}<|endoftext|>\n"
    "{% else %}User: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Story:{% endif %}"
)
_GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}{% endfor %}"
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        GPT2LMHeadModel,
        GPT2Config,
        dict(
            n_layer=6,
            n_embd=96,
            n_head=4,
            n_positions=POSITIONS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        ("<|endoftext|>",),
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
        None,
        _GPT2,
    ),
    "gemma": Family(
        Gemma2ForCausalLM,
        Gemma2Config,
        dict(
            num_hidden_layers=5,
            hidden_size=104,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=256,
            query_pre_attn_scalar=32,
            sliding_window=256,
            final_logit_softcapping=30.0,
            attn_logit_softcapping=50.0,
        ),
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<pad>",
        "<eos>",
        "<end_of_turn>",
        "<bos>",
        _GEMMA,
    ),
    "qwen": Family(
        Qwen3ForCausalLM,
        Qwen3Config,
        dict(
            num_hidden_layers=7,
            hidden_size=88,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            intermediate_size=224,
        ),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|endoftext|>",
        "<|endoftext|>",
        "<|im_end|>",
        None,
        _QWEN,
        second=True,
    ),
    "llama": Family(
        LlamaForCausalLM,
        LlamaConfig,
        dict(
            num_hidden_layers=5,
            hidden_size=112,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=288,
        ),
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        "<|finetune_right_pad_id|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        _LLAMA,
    ),
    "mistral": Family(
        MistralForCausalLM,
        MistralConfig,
        dict(
            num_hidden_layers=8,
            hidden_size=96,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=192,
            sliding_window=None,
        ),
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"),
        "<pad>",
        "</s>",
        "</s>",
        "<s>",
        _MISTRAL,
    ),
}


def byte_bpe(texts: Iterable[str], specials: tuple[str, ...], prefix_space: bool = False) -> Tokenizer:
    """Byte-level BPE: every distinct piece of the texts is one token, any other text falls into bytes."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = sorted({text[a:b] for text in texts for _, (a, b) in split.pre_tokenize_str(text)})
    if prefix_space:
        pieces = [piece if piece.startswith(" ") else " " + piece for piece in pieces]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = spaced
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        min_frequency=1,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return tokenizer


def tokenizer(name: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The family's tokenizer: its special tokens, BOS where the family adds one, its chat template."""
    family = FAMILIES[name]
    core = byte_bpe(texts, family.specials)
    if family.bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, core.token_to_id(family.bos))],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        additional_special_tokens=[s for s in family.specials if s not in (family.bos, family.eos, family.pad)],
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = family.chat_template
    return fast


def model(name: str, words: PreTrainedTokenizerFast) -> Any:
    """The untrained model of the family, its generation defaults greedy and ended by either eos."""
    family = FAMILIES[name]
    ends = sorted({words.convert_tokens_to_ids(family.turn), words.eos_token_id})
    shape = dict(family.shape)
    if family.config is not GPT2Config:
        shape |= dict(max_position_embeddings=POSITIONS)
    config = family.config(
        vocab_size=len(words),
        bos_token_id=words.bos_token_id if family.bos else None,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **shape,
    )
    built = family.model(config)
    built.generation_config.update(
        do_sample=False,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
    )
    return built


def judge(texts: Iterable[str], labels: tuple[str, ...]) -> tuple[Any, PreTrainedTokenizerFast]:
    """(untrained classifier, its own tokenizer)."""
    specials = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
    core = byte_bpe(texts, specials, prefix_space=True)
    core.normalizer = normalizers.Lowercase()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=POSITIONS,
        type_vocab_size=1,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return BertForSequenceClassification(config), words
