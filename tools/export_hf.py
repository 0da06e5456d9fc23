"""Export a finished run as a Hugging Face Llama model, for transformers, lm-eval, vLLM and others.

reads   RUN/{config.json, ckpt.pt}, and the tokenizer of the run's data set
writes  OUT_DIR/{config.json, model.safetensors, tokenizer.json, tokenizer_config.json}
next    lm_eval --model hf --model_args pretrained=OUT_DIR --tasks lambada_openai

It needs pip install '.[hf]'. Losses and token ids are the run's own, except that in a text that contains the
end-of-text mark, transformers reads that token, and prepare.py reads text. The tokenizer puts the end-of-text token
first, as in training. llama.cpp cannot convert the tokenizer: it knows tokenizers by their hash.
"""

import json
import sys
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python tools/export_hf.py

from common import cli
from common.files import staged
from common.run import load_finished
from common.tokenizer import EOT, data_tokenizer
from model import Transformer
from sampler import load_dataset


def llama_config(model, eot):
    """model: that of the run's config.json; eot: id of the end-of-text token."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "vocab_size": model["vocab_size"], "max_position_embeddings": model["block_size"],
        "num_hidden_layers": model["n_layer"], "num_attention_heads": model["n_head"],
        "num_key_value_heads": model["n_kv_head"], "head_dim": model["n_embd"] // model["n_head"],
        "hidden_size": model["n_embd"], "intermediate_size": model["n_ffn"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,  # transformers 4 reads this, transformers 5 the next line
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": eot, "eos_token_id": eot,
    }  # fmt: skip


def llama_parameters(model):
    """{name: float32 tensor} as Llama has them.  The head is tied to the embedding and has no entry."""
    found = {"embed_tokens": model.embedding.weight, "norm": model.norm.weight}
    for i, block in enumerate(model.blocks):
        E, H, G = block.attention.head_size, block.attention.n_head, block.attention.n_kv_head
        q, k, v = block.attention.qkv.weight.split([H * E, G * E, G * E])
        gate, up = block.ffn.gate_up.weight.chunk(2)
        names = {"input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.ffn_norm.weight,
                 "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": block.attention.out.weight,
                 "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.ffn.down.weight}
        found |= {f"layers.{i}.{name}": tensor for name, tensor in names.items()}
    return {f"model.{name}.weight": tensor.detach().float().clone() for name, tensor in found.items()}


def byte_level_bpe(ranks, pattern, eot):
    """A tokenizers.Tokenizer with tiktoken's ids.  ranks: {bytes: id}; pattern: how text is split into words.

    tiktoken joins any two neighbours that form a token. A merge list joins only the pairs that it names, so this one
    names every split of every token, in the order of their ranks.
    """
    letters = [chr(b) for b in range(256)]  # ByteLevel's name of each byte: a printable character
    for i, b in enumerate([*range(33), *range(127, 161), 173]):
        letters[b] = chr(256 + i)
    name = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((name[token[:i]], name[token[i:]]))
    vocabulary = {name[token]: rank for token, rank in ranks.items()} | {EOT: eot}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
    # In Oniguruma, {1,3}+ repeats {1,3}; to tiktoken it is {1,3} without backtracking, which makes no difference here
    words = tokenizers.Regex(pattern.replace("{1,3}+", "{1,3}"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(words, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def hf_tokenizer(dataset):
    """The data set's tokenizer as a tokenizers.Tokenizer, and the name of its end-of-text token, which comes first."""
    tokenizer, eot = data_tokenizer(dataset), dataset.meta["eot_token"]
    if tokenizer.encoding:
        made = byte_level_bpe(tokenizer.encoding._mergeable_ranks, tokenizer.encoding._pat_str, eot)
    else:
        made = tokenizers.Tokenizer.from_buffer(tokenizer.file[1])
        made.no_truncation()
        made.no_padding()
    name = made.id_to_token(eot)
    made.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A $B:1", special_tokens=[(name, eot)])
    return made, name


def save_parameters(parameters, path):
    try:
        save_file(parameters, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the system's, of a full disk for instance
        raise OSError(None, str(error), str(path)) from None


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("run", type=cli.path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("out_dir", type=cli.path, metavar="OUT_DIR", help="the directory to make")
    parser.add_argument("--data_dir", type=cli.path,
                        help="the run's data set, for its tokenizer (default: where it was in training)")
    args = parser.parse_args(argv)
    config, checkpoint = load_finished(args.run, ("reference", "proxy", "large"))
    dataset = load_dataset(args.data_dir or config["data"]["data_dir"], 1)  # no windows are needed
    dataset.check_tokenizer(args.run, config)
    model = Transformer.load(config, checkpoint["model"], torch.float32)
    tokenizer, eot = hf_tokenizer(dataset)
    model_config = llama_config(config["model"], dataset.meta["eot_token"])
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot,
                        "model_max_length": config["model"]["block_size"], "clean_up_tokenization_spaces": False}
    with staged(args.out_dir) as folder:
        (folder / "config.json").write_text(json.dumps(model_config, indent=2) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        save_parameters(llama_parameters(model), folder / "model.safetensors")
    print(f"written: {args.out_dir}, {config['n_params']:,} parameters")


if __name__ == "__main__":
    cli.run(main)
