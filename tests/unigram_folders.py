"""Small tokenizers with a SentencePiece Unigram, laid out as XLM-R's and CamemBERT's are, with their models."""

import math
from collections import Counter

import torch
import transformers

TEXT = """Les élèves étudient à l'école où ils étaient hier. Où êtes-vous allés ce soir ? Nous étudions ici, à côté.
Der Schüler lernt heute in der Schule. Die Straße ist größer als gestern, und der Weg ist weit.
The pupil learns at school today; the street is longer than it was, and the way is long.
我们今天去北京。你喜欢看电影吗？我们喜欢。
私はカメラを買いました。 وقت الدرس
a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E N O S T U < >
/ \\ 0 1 2 3 4 5 6 7 8 9 . , ; : ! ? ' " - ( )
"""
TABLE = {
    **dict.fromkeys(("\t", "\n", "\r", "\xa0", "\u3000", "\u200b"), " "),
    **{chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)},
    **{"ﬁ": "fi", "①": "1", "e\u0301": "é", "u\u0308": "ü", "…": "...", "\ufeff": "", "\x07": "", "ᄒ\u1161": "하"},
}
"""A few of the replacements in SentencePiece's own table, nmt_nfkc."""
XLM_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
CAMEMBERT = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def precompiled(table):
    """SentencePiece's format of a table of characters: a trie as a double array, then the replacements."""
    normalized, places = bytearray(), {}
    for key, value in table.items():
        places[key.encode()] = len(normalized)
        normalized += value.encode() + b"\0"
    units, taken = [0] * 4096, {0}

    def put(node, prefix):
        following = sorted({key[len(prefix)] for key in places if key.startswith(prefix) and len(key) > len(prefix)})
        is_key = prefix in places
        slots = [*([0] if is_key else []), *following]
        base = next(base for base in range(1, 4096 - 256) if not taken & {base ^ slot for slot in slots})
        taken.update(base ^ slot for slot in slots)
        units[node] |= (node ^ base) << 10 | is_key << 8
        if is_key:
            units[base] = 1 << 31 | places[prefix]
        for byte in following:
            units[base ^ byte] = byte
            put(base ^ byte, prefix + bytes([byte]))

    put(0, b"")
    array = b"".join(unit.to_bytes(4, "little") for unit in units)
    return len(array).to_bytes(4, "little") + array + bytes(normalized)


def pieces():
    """Tokens with scores: all characters of the text, and what occurs twice within a word."""
    counts = Counter()
    for word in TEXT.split():
        word = f"▁{word}"
        counts.update(word[start:end] for start in range(len(word)) for end in range(start + 1, len(word) + 1))
    kept = {piece: count for piece, count in counts.items() if count > 1 or len(piece) == 1}
    total = sum(kept.values())
    return [(piece, math.log(count / total)) for piece, count in sorted(kept.items())]


def save_tokenizer(folder, family):
    """Save a tokenizer by transformers' class, "XLMRoberta" or "Camembert"."""
    first = XLM_ROBERTA if family == "XLMRoberta" else CAMEMBERT
    vocabulary = [*((token, -100.0 if token == "<unk>NOTUSED" else 0.0) for token in first), *pieces(), ("<mask>", 0.0)]
    tokenizer_class = getattr(transformers, f"{family}Tokenizer")
    tokenizer = tokenizer_class(vocab=vocabulary, _spm_precompiled_charsmap=precompiled(TABLE), model_max_length=62)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder, family):
    """Save a masked-LM model for 62 tokens with its tokenizer, as they are on the hub."""
    tokenizer = save_tokenizer(folder, family)
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    positions = {"max_position_embeddings": 64, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **SIZES, **positions, **special)
    getattr(transformers, f"{family}ForMaskedLM")(config).save_pretrained(folder)
